"""A run that resumes from a checkpoint on the device, through the real script."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.device import REHEARSED
from tests.gpu.measured import Measured
from tests.gpu.runs import Job, run_script
from tests.helpers.runs import steps

pytestmark = pytest.mark.gpu(seconds=240)

LENGTHS = [40, 30, 17, 12] * 4 if REHEARSED else [40, 300, 17, 129, 64, 200] * 4


@pytest.mark.parametrize(
    "training",
    [{}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}],
    ids=["float32", "bf16", "bf16, checkpointing"],
)
def test_resume_is_bit_for_bit(
    tmp_path: Path, training: dict[str, Any], measured: Measured
) -> None:
    """Steps 5 to 8 again from the checkpoint of step 4: weights, optimizer, logged steps."""
    job = Job(tmp_path, LENGTHS)
    asked = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "warmup_steps": 2}
    asked |= {"full_determinism": True, **training}
    config = job.run("whole", row_tokens=500, training=asked)
    run_script(config)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(whole, cut)
    for name in ("checkpoint-8", "model"):
        shutil.rmtree(cut / name)
    (cut / "summary.json").unlink()
    config.output = str(cut)
    said = run_script(config)
    assert "resuming from checkpoint-4" in said
    expected, found = (steps(run) for run in (whole, cut))
    assert len(expected) == 8
    measured(
        "logged steps that differ", sum(a != b for a, b in zip(found, expected, strict=True)), 0
    )
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, cut)]
    measured("weights that differ", unequal(*weights), 0)
    measured("weights in all", sum(tensor.numel() for tensor in weights[0].values()))
    states = [
        torch.load(run / "checkpoint-8" / "optimizer.pt", weights_only=True, map_location="cpu")
        for run in (whole, cut)
    ]
    flat = [
        {f"{number} {name}": value for number, given in state["state"].items()
         for name, value in given.items()}
        for state in states
    ]  # fmt: skip
    measured("optimizer states that differ", unequal(*flat), 0)


def unequal(one: dict[str, Any], other: dict[str, Any]) -> int:
    assert one.keys() == other.keys()
    return sum(int((one[name] != other[name]).sum()) for name in one)
