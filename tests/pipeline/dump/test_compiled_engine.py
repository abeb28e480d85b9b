"""A dump by vLLM's compiled model, which is what a GPU runs by default."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.agreement import Answer, grid_of
from pipeline.dump import recompute
from storage import LogitDataset
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import SCRIPT, settings

EVERY = 1000
"""More rows than the dumps have."""


@pytest.mark.vllm
@pytest.mark.long
def test_a_compiled_dump_is_the_eager_one(model_path: Path, tmp_path: Path) -> None:
    """In chunks, so that the compiled forward meets several shapes."""
    kl = {}
    for name, eager in (("eager", True), ("compiled", False)):
        dump, cache = dumped(model_path, tmp_path / name, eager)
        compiled = list(cache.rglob("torch_compile_cache/**/*.py"))
        assert bool(compiled) is not eager
        lines, answer = recompute.against(str(dump), str(model_path), EVERY)
        assert answer is Answer.SAME, lines
        checks = recompute.recompute(str(dump), str(model_path), EVERY)
        assert sum(len(check.kl) for check in checks) > 500
        kl[name] = np.concatenate([check.kl for check in checks])
    off = np.abs(kl["compiled"] - kl["eager"]).mean()
    assert off < grid_of(LogitDataset(dump))


def dumped(model: Path, folder: Path, eager: bool) -> tuple[Path, Path]:
    """(the dump that the script writes, vLLM's cache, which was empty)."""
    folder.mkdir()
    corpus = write_texts(folder / "corpus.jsonl", some_texts(12))
    arguments = {"enforce_eager": eager, "max_num_batched_tokens": 128}
    config = settings(folder, model, corpus, engine="vllm", engine_args=arguments)
    (folder / "config.yaml").write_text(json.dumps(asdict(config)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", str(folder / "config.yaml")],
        env=os.environ | {"VLLM_CACHE_ROOT": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "dump", folder / "cache"
