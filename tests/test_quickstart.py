"""The demo with few steps: all stages through the real scripts, with vLLM."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import demo, script_files
from pipeline.errors import RefusedError
from storage import LogitDataset, verify
from tests.helpers import scripts
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


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], str]:
    """A function that runs the demo with its real scripts, and returns what they wrote."""
    options = [part for setting in SHORT for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path), *options])

    def run() -> str:
        written = []

        def run_script(name: str, *words: str, folder: Path | None = None) -> None:
            done = scripts.run(name, *words, cwd=folder)
            assert done.returncode == 0, done.stderr
            written.append(done.stdout + done.stderr)

        monkeypatch.setattr(script_files, "run_script", run_script)
        assert runpy.run_path(str(SCRIPT))["main"]() == 0
        return "".join(written)

    return run


@pytest.mark.slow
@pytest.mark.vllm
def test_the_whole_job(tmp_path: Path, quickstart: Callable[[], str]) -> None:
    written = quickstart()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["models"]) == ["base", "ce", "mol"]
    for model in results["models"].values():
        assert {"domain_perplexity", "general_perplexity", "kl_to_base"} <= set(model)
    assert results["models"]["base"]["kl_to_base"] == 0
    assert results["models"]["ce"]["kl_to_base"] > 0
    assert "perplexity" in written  # the table
    assert (tmp_path / "perplexities.png").stat().st_size > 10_000
    dataset = LogitDataset(tmp_path / "dump")
    assert dataset.plan["engine"]["name"] == "vllm"
    assert verify(tmp_path / "dump").ok
    summary = json.loads((tmp_path / "mol" / "summary.json").read_text())
    assert 0 <= summary["null_test_kl"] < 2e-3

    assert quickstart().count("nothing left to do") == 4
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_no_document_is_in_two_files(tmp_path: Path) -> None:
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
    with pytest.raises(RefusedError, match=r"overrides\.dump: None in the demo, \['--k=8'\] asked"):
        demo.check_same(tmp_path, {"dump": ["--k=8"]})


def test_comments_in_configs_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(SCRIPTS / demo.CONFIGS, configs)
    monkeypatch.setattr(demo, "CONFIGS", str(configs))
    demo.check_same(tmp_path / "demo", {})
    dump = configs / "dump.yaml"
    dump.write_text("# other words\n" + dump.read_text())
    demo.check_same(tmp_path / "demo", {})
    dump.write_text(dump.read_text().replace("k: 64", "k: 63"))
    with pytest.raises(RefusedError, match=r"configs\.dump\.k: 64 in the demo, 63 asked"):
        demo.check_same(tmp_path / "demo", {})
