"""The null test on the device: a student with the teacher's weights, in the usual dtypes."""

from pathlib import Path

import pytest

from pipeline.config import NullTestConfig
from pipeline.errors import RefusedError
from pipeline.training import train
from tests.gpu.device import DEVICE, REHEARSED
from tests.gpu.measured import Measured
from tests.gpu.runs import Job
from tests.helpers.dumps import with_rows

pytestmark = pytest.mark.gpu

LENGTHS = [40, 30, 17, 12] * 4 if REHEARSED else [40, 300, 17, 129, 64, 200] * 4
DTYPES = {
    "float32": ("float32", False, 5.2e-4),
    "bfloat16": ("bfloat16", True, 2.3e-3),
    "float32 dump, bf16 student": ("float32", True, 2.3e-3),
}
"""Of the dump, whether the student has bf16, and the default bound, which the settings' help names.
"""


@pytest.mark.parametrize("kind", DTYPES)
def test_the_same_model_passes(kind: str, tmp_path: Path, measured: Measured) -> None:
    """A dump by transformers: the KL of its own model before the first step."""
    dtype, bf16, bound = DTYPES[kind]
    job = Job(tmp_path, LENGTHS, dtype=dtype)
    config = job.run(
        "run", null_test=NullTestConfig(batches=8), training={"max_steps": 1, "bf16": bf16}
    )
    found = train.run(config)["null_test"]
    assert found["answer"] == "the same"
    measured("KL", found["kl"], 1.2 * bound, unit="nats")  # chance adds a little to the bound


def test_rows_that_are_off_by_one_are_refused(tmp_path: Path, measured: Measured) -> None:
    """The same dump with each distribution one position later."""
    from dataclasses import replace

    import numpy as np

    from storage import Record, TopK

    def later(record: Record) -> Record:
        ids, logprobs = record.topk.dense()
        ids, logprobs = np.roll(ids, 1, 0), np.roll(logprobs, 1, 0)
        tail = np.roll(record.topk.tail_logprob, 1)
        return replace(record, topk=TopK.from_dense(ids, logprobs, tail))

    job = Job(tmp_path, LENGTHS)
    job.dump = with_rows(job.dump, tmp_path / "later", later)
    with pytest.raises(RefusedError, match="Shifted"):
        train.run(job.run("run", training={"max_steps": 1, "bf16": DEVICE == "cuda"}))
    measured("refused", 1, least=1)
