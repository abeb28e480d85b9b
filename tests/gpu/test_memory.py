"""The memory estimate of a run against the true peak of the device."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training import memory, train
from pipeline.training.memory import Estimate
from tests.gpu.device import DEVICE, REHEARSED
from tests.gpu.measured import Measured
from tests.gpu.runs import Job

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {
    "vocab_size": 65_536,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "initializer_range": 0.03,
}
LENGTH = 128 if REHEARSED else 2048
GIB = 2**30


class Done(Exception):
    """The run has made its steps."""


@pytest.mark.parametrize(
    "training",
    [{}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}],
    ids=["float32", "bf16", "bf16, checkpointing"],
)
def test_the_estimate_holds(
    tmp_path: Path,
    training: dict[str, Any],
    measured: Measured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Peak of the tensors of a few steps. The estimate adds up what never is there at once, and
    leaves out workspaces: so the peak may be a tenth above it, and must be more than 0.6 of it."""
    job = Job(tmp_path, [LENGTH] * 8, **SHAPE)
    estimates: list[Estimate | None] = []
    peaks: list[int] = []
    check = memory.check

    def checked(*arguments: Any) -> Estimate | None:
        estimates.append(check(*arguments))
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before.append(torch.cuda.memory_allocated())
        return estimates[-1]

    def done(*_: Any) -> None:
        if DEVICE == "cuda":
            peaks.append(torch.cuda.max_memory_allocated() - before[0])
        raise Done

    before: list[int] = []
    monkeypatch.setattr(memory, "check", checked)
    monkeypatch.setattr(train, "save_final", done)
    asked = {"max_steps": 3, "per_device_train_batch_size": 2, **training}
    with pytest.raises(Done):
        train.run(job.run("run", row_tokens=2 * LENGTH, training=asked))
    (found,) = estimates
    assert found is not None
    assert found.activations is not None
    measured("estimate", found.total / GIB, unit="GiB")
    for name in ("weights", "gradients", "optimizer", "loss", "activations"):
        measured(name, getattr(found, name) / GIB, unit="GiB")
    if DEVICE == "cpu":
        pytest.skip("the peak is that of CUDA's allocator")
    measured("peak", peaks[0] / GIB, unit="GiB")
    measured("peak / estimate", peaks[0] / found.total, 1.1, least=0.6)
