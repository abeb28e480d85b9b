"""A step of stage two on the device: against its definition in float64, bf16 against float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.losses import Direction
from pipeline.training import train
from tests.gpu.device import REHEARSED
from tests.gpu.measured import Measured
from tests.gpu.runs import Job
from tests.helpers import masked_step
from tests.helpers.losses import both
from tests.helpers.masked_step import LAYOUTS, items
from tests.helpers.runs import steps
from tests.pipeline.training.test_trainer import naive

pytestmark = pytest.mark.gpu

LENGTHS = [40, 30, 17, 12] * 2 if REHEARSED else [40, 300, 17, 129, 64, 200, 511, 90] * 4

BOUNDS = {"float64": 1e-11, "float32": 2e-5}
"""Of the gradient: some hundred roundings on its way through two layers, and a few hundred tokens.
float64 tells a wrong formula."""


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Size of the difference of whole gradients, as a share of the expected one."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].cpu().double(), expected[name].double()) for name in expected]
    difference = torch.stack([(one - other).norm() for one, other in pairs]).norm()
    return float(difference / torch.stack([other.norm() for _, other in pairs]).norm())


@both
@pytest.mark.parametrize("layout", ["one row", "micro-batches", "short rows"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_gradient_of_a_masked_step(
    tmp_path: Path,
    direction: Direction,
    layout: str,
    dtype: str,
    measured: Measured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DistillTrainer's gradient against the losses' definition, a position at a time in float64."""
    given = items("some")
    loss, expected = naive(given, direction)
    whole = masked_step.model
    monkeypatch.setattr(masked_step, "model", lambda: whole().to(getattr(torch, dtype)))
    found = masked_step.step(tmp_path, given, direction, LAYOUTS[layout])
    measured("gradient off by", gradient_error(found["gradients"], expected), BOUNDS[dtype])
    logged = found["logged"]["loss"]
    measured("loss off by", abs(logged - loss.item()) / loss.item(), 2e-6)  # logged in float32


def run(job: Job, name: str, direction: str, **training: Any) -> list[dict[str, Any]]:
    from pipeline.config import LossConfig

    asked = {"max_steps": 10, "learning_rate": 1e-3, "warmup_steps": 0, "seed": 1, **training}
    asked["per_device_train_batch_size"] = 4
    loss: Any = LossConfig(direction=direction)  # type: ignore[arg-type]
    config = job.run(name, row_tokens=1500, loss=loss, training=asked)
    train.run(config)
    return steps(config.output)


@both
def test_bf16_learns_what_float32_learns(
    tmp_path: Path, direction: str, measured: Measured
) -> None:
    """Ten steps from the same weights. bfloat16 keeps 8 bits: a number may be off by 0.4 %."""
    job = Job(tmp_path, LENGTHS, vocab_size=32_000)
    exact = run(job, "float32", direction)
    found = run(job, "bf16", direction, bf16=True)
    lean = run(job, "lean", direction, bf16=True, gradient_checkpointing=True)
    assert len(exact) == 10
    first, last = (abs(found[at]["ce"] / exact[at]["ce"] - 1) for at in (0, -1))
    measured("CE of step 1 off by", first, 2e-3)
    measured("of step 10", last, 2e-2)
    norm = abs(found[0]["grad_norm"] / exact[0]["grad_norm"] - 1)
    measured("gradient's norm of step 1", norm, 2e-2)
    measured("CE fell by", exact[0]["ce"] - exact[-1]["ce"], least=0.05, unit="nats")
    measured("KL of step 10 off by", abs(found[-1]["kl"] / exact[-1]["kl"] - 1), 5e-2)
    checkpointed = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(lean, found, strict=True))
    measured("gradient checkpointing changes the loss by", checkpointed, 1e-2)
