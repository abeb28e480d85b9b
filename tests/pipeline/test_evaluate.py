"""Perplexities and distances against a naive computation in float64."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import evaluate
from pipeline.config import ConfigError, CorpusConfig, EvalConfig, RefusedError
from pipeline.corpus import Corpus
from pipeline.model_dir import load_tokenizer
from tests.models import tiny_model
from tests.pipeline.corpora import some_texts, write_texts

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "student", seed=3)


@pytest.fixture
def general(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "general.jsonl", some_texts(9))


def naive(model: Path, base: Path, corpus: Path) -> dict[str, float]:
    """One sequence at a time, all of it in float64."""
    ours = AutoModelForCausalLM.from_pretrained(model).double()
    theirs = AutoModelForCausalLM.from_pretrained(base).double()
    sums = np.zeros(5)
    for sequence in Corpus(CorpusConfig(str(corpus)), load_tokenizer(base), 100).sequences():
        ids = torch.from_numpy(sequence.input_ids[None].astype(np.int64))
        with torch.no_grad():
            q = ours(ids).logits[0, :-1].log_softmax(-1)
            p = theirs(ids).logits[0, :-1].log_softmax(-1)
        for t in range(len(q)):
            sums += [
                1,
                -q[t, ids[0, t + 1]].item(),
                (p[t].exp() * (p[t] - q[t])).sum().item(),
                (q[t].exp() * (q[t] - p[t])).sum().item(),
                float(q[t].argmax() == p[t].argmax()),
            ]
    tokens, nll, forward, reverse, same = sums
    return {
        "tokens": tokens,
        "perplexity": math.exp(nll / tokens),
        "nats_per_token": nll / tokens,
        "forward_kl": forward / tokens,
        "reverse_kl": reverse / tokens,
        "top1_agreement": same / tokens,
    }


@pytest.mark.parametrize("batch_tokens", [64, 1000])
def test_measures_equal_the_naive_ones(
    tmp_path: Path, model_path: Path, student: Path, general: Path, batch_tokens: int
) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(5)])
    report = evaluate.run(
        EvalConfig(
            models={"base": str(model_path), "student": str(student)},
            domain=CorpusConfig(str(domain)),
            general=CorpusConfig(str(general)),
            max_length=100,
            batch_tokens=batch_tokens,
        )
    )
    for name, path in [("base", model_path), ("student", student)]:
        for kind, corpus in [("domain", domain), ("general", general)]:
            expected = naive(path, model_path, corpus)
            assert report["models"][name][kind] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    found = report["models"]["student"]
    assert found["kl_to_base"] == found["general"]["forward_kl"] > 0.1
    assert found["domain_perplexity"] == found["domain"]["perplexity"]
    assert report["models"]["base"]["kl_to_base"] == 0


def test_script_prints_a_table_and_writes_json(
    tmp_path: Path, model_path: Path, student: Path, general: Path
) -> None:
    config = {
        "models": {"base": str(model_path), "student": str(student)},
        "general": {"path": str(general)},
        "output": str(tmp_path / "results" / "results.json"),
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert set(results["models"]) == {"base", "student"}
    line = next(line for line in done.stdout.splitlines() if line.startswith("student"))
    assert f"{results['models']['student']['general_perplexity']:.3f}" in line


def test_other_tokenizer_is_refused(
    tmp_path: Path, model_path: Path, student: Path, general: Path
) -> None:
    shutil.copytree(student, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "A", "B"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    models = {"base": str(model_path), "other": str(tmp_path / "other")}
    with pytest.raises(RefusedError, match="another tokenizer"):
        evaluate.run(EvalConfig(models, general=CorpusConfig(str(general))))


def test_nothing_to_evaluate(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give domain\.path"):
        EvalConfig({"base": str(model_path)})
    with pytest.raises(ConfigError, match="one of the models is meant"):
        EvalConfig({"student": str(model_path)}, general=CorpusConfig("x.jsonl"))
    empty = write_texts(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(ConfigError, match="two tokens"):
        evaluate.run(EvalConfig({"base": str(model_path)}, general=CorpusConfig(str(empty))))
