"""Sampled and hybrid targets from end to end: dump, verify, train, through the real scripts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.agreement import Answer
from pipeline.config import CorpusConfig, DumpConfig, LossConfig, TrainConfig
from pipeline.data.packing import packed_rows
from pipeline.dump import dump
from pipeline.dump import recompute as verify
from pipeline.errors import ConfigError, RefusedError
from pipeline.training import train
from storage import LogitDataset, Record, Samples
from storage import verify as verify_storage
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import with_rows
from tests.helpers.models import tiny_model
from tests.helpers.runs import settings, yaml_of

MakeDump = Callable[[int, int], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> MakeDump:
    """A function (k, samples) -> a finished dump of `model_path`, which is made once."""
    folder = tmp_path_factory.mktemp("sampled")
    corpus = write_texts(folder / "corpus.jsonl", some_texts(30))

    def made(k: int, samples: int) -> Path:
        output = folder / f"{k}-{samples}"
        if not output.exists():
            dump.run(
                DumpConfig(
                    model=str(model_path),
                    corpus=CorpusConfig(str(corpus)),
                    output=str(output),
                    k=k,
                    samples=samples,
                    min_prob=0.0,
                    max_length=100,
                    engine="transformers",
                    shard_tokens=2000,
                )
            )
        return output

    return made


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(6)])


@pytest.mark.parametrize(("k", "samples"), [(8, 16), (0, 24)])
def test_the_scripts_dump_verify_and_train_with_samples(
    tmp_path: Path, model_path: Path, domain: Path, k: int, samples: int
) -> None:
    corpus = write_texts(tmp_path / "corpus.jsonl", some_texts(12))
    words = ["--model", model_path, "--corpus.path", corpus, "--output", tmp_path / "dump"]
    words += [f"--k={k}", f"--samples={samples}", "--engine=transformers", "--max_length=100"]
    done = scripts.run("dump_logits.py", *words)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "dump" / "plan.json").read_text())
    assert (plan["k"], plan["samples"], plan["sample_seed"]) == (k, samples, 0)
    assert scripts.run("dump_logits.py", *words, "--sample_seed=1").returncode == 3
    done = scripts.run("verify_dump.py", tmp_path / "dump", "--against", model_path, "--sample", 5)
    assert done.returncode == 0, done.stdout + done.stderr
    config = settings(tmp_path, model_path, tmp_path / "dump", domain)
    done = scripts.run("train_student.py", "--config", yaml_of(tmp_path / "train.yaml", config))
    assert done.returncode == 0, done.stderr
    assert "the dump is this model's" in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["general_tokens"] > 0
    assert summary["kl"] > 0


def test_samples_do_not_change_the_stored_top_k(make: MakeDump) -> None:
    for one, other in zip(LogitDataset(make(8, 16)), LogitDataset(make(8, 0)), strict=True):
        for name in ("counts", "ids", "logprobs", "tail_logprob"):
            np.testing.assert_array_equal(getattr(one.topk, name), getattr(other.topk, name))
        assert other.topk.samples is None
        samples = one.topk.samples
        assert samples is not None
        assert samples.draws == 16
    assert verify_storage(make(8, 16)).ok


def test_batches_hold_kept_and_sampled_ids(make: MakeDump) -> None:
    records = [LogitDataset(make(8, 16))[row] for row in range(3)]
    (batch,) = packed_rows([], records)
    targets = batch["targets"]
    np.testing.assert_allclose(targets["logprobs"].exp().sum(1), 1, atol=1e-5)
    assert targets["tail_logprob"].isneginf().all()
    samples = [record.topk.samples for record in records]
    widest = max(8 + int(one.counts.max()) for one in samples if one is not None)
    assert targets["ids"].shape[1] == widest
    bare = [LogitDataset(make(8, 16), samples=False)[row] for row in range(3)]
    assert packed_rows([], bare)[0]["targets"]["ids"].shape[1] == 8


def config_of(tmp_path: Path, model: Path, dumps: Any, domain: Path, **loss: Any) -> TrainConfig:
    config = settings(
        tmp_path, model, None, domain, mix=0, max_length=100, training={"max_steps": 1}
    )
    config.mix, config.max_length, config.loss = 1, None, LossConfig(**loss)
    config.dump = dumps if isinstance(dumps, dict) else str(dumps)
    return config


@pytest.mark.parametrize(
    ("shape", "loss", "message"),
    [
        ((8, 16), {"direction": "reverse"}, "unbiased in the forward direction alone"),
        ((0, 24), {"direction": "reverse"}, "unbiased in the forward direction alone"),
        ((0, 24), {"targets": "topk"}, "holds samples alone"),
    ],
)
def test_settings_that_samples_do_not_allow_are_refused(
    tmp_path: Path,
    model_path: Path,
    domain: Path,
    make: MakeDump,
    shape: tuple[int, int],
    loss: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        train.run(config_of(tmp_path, model_path, make(*shape), domain, **loss))


def test_targets_topk_equals_a_dump_without_samples(
    tmp_path: Path, model_path: Path, domain: Path, make: MakeDump
) -> None:
    other = tiny_model(tmp_path / "other", seed=9)
    kls = {}
    for name, shape, loss in [
        ("bare", (8, 0), {}),
        ("topk", (8, 16), {"targets": "topk"}),
        ("reverse", (8, 16), {"targets": "topk", "direction": "reverse"}),
        ("auto", (8, 16), {}),
    ]:
        config = config_of(tmp_path, other, make(*shape), domain, **loss)
        config.output = str(tmp_path / name)
        kls[name] = train.run(config)["kl"]
    assert kls["topk"] == kls["bare"]
    assert kls["auto"] > kls["bare"]  # samples show single ids of the tail


def test_mixed_dumps_must_hold_the_same_kind(
    tmp_path: Path, model_path: Path, domain: Path, make: MakeDump
) -> None:
    mixed = {str(make(8, 16)): 1.0, str(make(8, 0)): 1.0}
    with pytest.raises(RefusedError, match=r"k 8, samples 16.*k 8, samples 0"):
        train.run(config_of(tmp_path, model_path, mixed, domain))
    train.run(config_of(tmp_path, model_path, mixed, domain, targets="topk"))


def shifted(record: Record) -> Record:
    """Move the samples of each position to the next one."""
    samples = record.topk.samples
    assert samples is not None
    parts = list(zip(*(np.split(part, np.cumsum(samples.counts)[:-1])
                       for part in (samples.ids, samples.times)), strict=True))  # fmt: skip
    parts = parts[-1:] + parts[:-1]
    ids, times = (np.concatenate(part) for part in zip(*parts, strict=True))
    moved = Samples(samples.draws, np.roll(samples.counts, 1), ids, times)
    topk = type(record.topk)(**{**vars(record.topk), "samples": moved})
    return Record(record.doc_id, record.chunk, record.input_ids, topk)


@pytest.mark.parametrize("k", [0, 8])
def test_null_test_finds_shifted_samples(
    tmp_path: Path, model_path: Path, domain: Path, make: MakeDump, k: int
) -> None:
    """Samples are shifted with k = 0. In a hybrid dump they share the positions of the top-k,
    whose shift another test finds."""
    path = make(k, 24)
    config = config_of(tmp_path, model_path, path, domain)
    kl = train.run(config)["null_test_kl"]
    assert abs(kl) < 0.1
    if k:
        assert kl < 1e-3
        return
    wrong = with_rows(path, tmp_path / "shifted", shifted)
    config = config_of(tmp_path, model_path, wrong, domain)
    config.output = str(tmp_path / "wrong")
    with pytest.raises(RefusedError, match=r"Shifted by -1 positions"):
        train.run(config)
    lines, answer = verify.against(str(wrong), str(model_path), 5)
    assert answer is not Answer.SAME
    assert sum("<- " in line for line in lines) == 5
