"""The demo, cut short: the whole path through the real scripts, vLLM included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import demo
from storage import LogitDataset, verify
from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "quickstart.py"
SHORT = [
    "base.training.max_steps=6",
    "base.domain.limit=60",
    "dump.corpus.limit=60",
    "ce.training.max_steps=4",
    "ce.training.eval_steps=2",
    "mol.training.max_steps=4",
    "mol.training.eval_steps=2",
    *(f"{run}.held_out.{kind}.limit=3" for run in ("ce", "mol") for kind in ("domain", "general")),
    "evaluate.domain.limit=3",
    "evaluate.general.limit=10",
]


def quickstart(folder: Path) -> "subprocess.CompletedProcess[str]":
    options = [part for setting in SHORT for part in ("--set", setting)]
    command = [sys.executable, str(SCRIPT), "--output", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_whole_job(tmp_path: Path) -> None:
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["models"]) == ["base", "ce", "mol"]
    for model in results["models"].values():
        assert {"domain_perplexity", "general_perplexity", "kl_to_base"} <= set(model)
    assert results["models"]["base"]["kl_to_base"] == 0
    assert results["models"]["ce"]["kl_to_base"] > 0
    assert "perplexity" in done.stdout  # the table
    assert (tmp_path / "perplexities.png").stat().st_size > 10_000
    dataset = LogitDataset(tmp_path / "dump")
    assert dataset.plan["engine"]["name"] == "vllm"
    assert verify(tmp_path / "dump").ok
    summary = json.loads((tmp_path / "mol" / "summary.json").read_text())
    assert 0 <= summary["null_test_kl"] < 2e-3

    again = quickstart(tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing left to do") == 4
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_texts_are_apart(tmp_path: Path) -> None:
    """No document stands in two files, and the code carries no docstring of the prose."""
    demo.make_texts(tmp_path)
    seen: set[str] = set()
    for kind in ("general", "domain"):
        for part in ("train", "test"):
            lines = (tmp_path / f"{kind}-{part}.jsonl").read_text().splitlines()
            texts = {json.loads(line)["text"] for line in lines}
            assert len(texts) == len(lines) > 0
            assert not texts & seen
            seen |= texts


def test_other_settings_are_refused(tmp_path: Path) -> None:
    demo.check_same(tmp_path, {})
    demo.check_same(tmp_path, {})
    with pytest.raises(demo.RefusedError, match="other settings"):
        demo.check_same(tmp_path, {"dump": ["--k=8"]})
