"""Estimates against the finished dump."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pipeline.config import CorpusConfig, DumpConfig
from pipeline.dump import dump, estimate
from pipeline.dump.sizing import Size
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model


def config(tmp_path: Path, model: Path) -> DumpConfig:
    corpus = write_texts(tmp_path / "corpus.jsonl", some_texts(110))
    return DumpConfig(
        str(model), CorpusConfig(str(corpus)), str(tmp_path / "dump"), k=8, engine="transformers"
    )


def test_estimate_is_near_the_finished_dump(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "COUNTED", 55)
    settings = config(tmp_path, model_path)
    found = estimate.measure(settings, 33)
    assert not (tmp_path / "dump").exists()
    done = dump.run(settings)
    assert found.documents == 110
    assert found.tokens == pytest.approx(done["tokens"], rel=0.1)
    assert 0 < found.tokens_error < 0.2 * found.tokens
    assert abs(found.tokens - done["tokens"]) < 3 * found.tokens_error
    assert found.kept_mass == pytest.approx(done["kept_mass"], rel=0.1)
    assert found.disk == pytest.approx(done["bytes"] + done["tables_bytes"], rel=0.3)
    assert found.seconds == pytest.approx(found.tokens / found.tokens_per_s)
    assert found.break_even(found.tokens / 4) == pytest.approx(4)
    of = estimate.engine_of(found, settings)
    assert Size(found.tokens, 1, 1, of).disk == pytest.approx(found.disk)
    assert Size(found.tokens, 1, 1, of).seconds >= found.seconds + found.start_s
    masked = replace(found, masked=True, targets=found.tokens / 4)
    assert estimate.engine_of(masked, settings).shard_tokens == 4 * of.shard_tokens
    monkeypatch.setattr(estimate, "COUNTED", 1000)
    assert estimate.measure(settings, 2).tokens == done["tokens"]


def test_estimate_counts_targets(tmp_path: Path, model_path: Path) -> None:
    """The head's work and the bytes follow them."""
    whole = config(tmp_path, model_path)
    settings = replace(whole, positions=0.2, corpus=replace(whole.corpus, limit=20))
    found = estimate.measure(settings, 20)
    done = dump.run(settings)
    assert (found.tokens, found.targets) == (done["tokens"], done["targets"])
    assert found.disk == pytest.approx(done["bytes"] + done["tables_bytes"], rel=0.3)
    has = estimate.weights(ModelFolder(model_path))
    share = done["targets"] / done["tokens"]
    assert found.flops_per_token == pytest.approx(2 * (has.body + share * has.head))
    said = estimate.describe(found, settings, None)
    assert f"{found.targets:,.0f} of them targets" in said
    assert f"{found.bytes_per_target:.1f} per target" in said
    assert "target" not in estimate.describe(replace(found, masked=False), whole, None)


@pytest.mark.parametrize("tie", [True, False])
def test_flops_count_the_weights_that_are_multiplied(tmp_path: Path, tie: bool) -> None:
    """Against the linear layers of the loaded model."""
    path = tiny_model(tmp_path / "model", tie=tie)
    model = AutoModelForCausalLM.from_pretrained(path)
    found = estimate.weights(ModelFolder(path))
    assert found.total == sum(weight.numel() for weight in model.parameters())
    linear = [m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear"]
    norms = sum(w.numel() for name, w in model.named_parameters() if "norm" in name)
    assert found.body + found.head == sum(linear) + norms
    assert found.head == model.get_output_embeddings().weight.numel()


def test_what_is_measured_begins_where_there_is_something_to_store(
    tmp_path: Path, model_path: Path
) -> None:
    texts = [""] * 40 + some_texts(20)
    corpus = write_texts(tmp_path / "c.jsonl", texts)
    settings = replace(config(tmp_path, model_path), corpus=CorpusConfig(str(corpus), skip=5))
    found = estimate.measure(settings, 10)
    assert found.documents == 55
    assert found.sample_tokens > 0
    empty = CorpusConfig(str(corpus), limit=40)
    with pytest.raises(ConfigError, match="no document has two tokens or more"):
        estimate.measure(replace(settings, corpus=empty), 10)


def test_script_prints_the_estimate_and_writes_nothing(tmp_path: Path, model_path: Path) -> None:
    settings = config(tmp_path, model_path)
    words = ["--model", settings.model, "--k", "8", "--corpus.path", settings.corpus.path]
    words += ["--output", settings.output, "--engine", "transformers", "--estimate", "20"]
    words += ["--run_tokens", "1000", "--summary", str(tmp_path / "s.json")]
    done = scripts.run("dump_logits.py", *words)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "dump").exists()
    found = json.loads((tmp_path / "s.json").read_text())
    assert f"after {found['tokens'] / 1000:.3g} runs" in done.stdout
    assert f"{found['bytes_per_token']:.1f} bytes per token" in done.stdout
    assert "110 documents" in done.stdout
    assert "on several machines, of workers: 1 each" in done.stdout
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["machines", "---", "1", "4", "16", "64"]
    assert f"the top 8 hold {found['kept_mass']:.1%} of the probability; the rest" in done.stdout


def test_estimate_says_what_stands_for_the_tail() -> None:
    corpus = CorpusConfig("corpus.jsonl")
    hybrid = estimate.kept(0.774, DumpConfig("m", corpus, "out", k=64, samples=32))
    assert hybrid.endswith(" hold 77.4% of the probability, 32 samples stand for the rest")
    alone = estimate.kept(0.0, DumpConfig("m", corpus, "out", k=0, samples=50))
    assert " ".join(alone.split()) == "kept 50 samples stand for the rest"
