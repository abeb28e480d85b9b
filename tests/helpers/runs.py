"""Runs of stage two for the tests: settings, the real script, the logged steps."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import CorpusConfig, TrainConfig
from tests.helpers import scripts
from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "train_student.py"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
"""Settings of QLoRA, as transformers.BitsAndBytesConfig takes them."""
UNTIMED = {"tokens_per_s", "wait_share"}


def settings(
    tmp_path: Path, model: Path, dump: Path | None, domain: Path, **changes: Any
) -> TrainConfig:
    training = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        **changes.pop("training", {}),
    }
    given = {
        "model": str(model),
        "domain": CorpusConfig(str(domain)),
        "dump": str(dump) if dump else None,
        "output": str(tmp_path / "run"),
        **changes,
    }
    return TrainConfig(**given, training=training)


def steps(run: Path | str) -> list[dict[str, Any]]:
    """The logged steps, without timings."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in UNTIMED}
        for line in lines
        if "ce" in line
    ]


def yaml_of(path: Path, config: TrainConfig) -> Path:
    path.write_text(json.dumps(asdict(config)))  # JSON is YAML
    return path


def script(
    config: Path, *arguments: str, ranks: int = 1, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the real script; several ranks communicate through gloo."""
    words = ["--config", str(config), *arguments]
    if ranks > 1:
        return scripts.run_ranks(ranks, SCRIPT, *words, **options)
    return scripts.run(SCRIPT, *words, **options)


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Assert that logged steps are equal, up to the order of float32 sums."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-6)
