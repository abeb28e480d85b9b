"""Two GPUs: training on two ranks, stage one with tensor parallelism and with two workers."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import CorpusConfig, DumpConfig, NullTestConfig
from pipeline.dump import dump
from tests.gpu.device import REHEARSED
from tests.gpu.measured import Measured
from tests.gpu.runs import Job, random_corpus, run_script
from tests.gpu.test_stage_one import LENGTHS as DOCUMENTS
from tests.gpu.test_stage_one import SHARE, compare, peaked_model
from tests.helpers.dumps import rows
from tests.helpers.runs import steps

pytestmark = pytest.mark.gpu(devices=2, seconds=300)

LENGTHS = [40, 30, 17, 12] * 4 if REHEARSED else [40, 300, 17, 129, 64, 200] * 4
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
KINDS = {"ddp": {}, "fsdp": FSDP, "fsdp, bf16": FSDP | {"bf16": True}}
BOUNDS = {"ddp": 2e-4, "fsdp": 2e-4, "fsdp, bf16": 2e-2}
"""Of logged numbers: the order of float32's sums over some steps; bfloat16 keeps 8 bits."""


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_what_one_learns(kind: str, tmp_path: Path, measured: Measured) -> None:
    """Six steps of the same sequences on one rank and on two, through the real script."""
    job = Job(tmp_path, LENGTHS)
    logged = {}
    for ranks in (1, 2):
        training = {"max_steps": 6, "per_device_train_batch_size": 4 // ranks}
        training |= KINDS[kind] if ranks == 2 else {"bf16": "bf16" in kind}
        config = job.run(
            f"on_{ranks}", row_tokens=500, null_test=NullTestConfig(batches=2), training=training
        )
        said = run_script(config, ranks)
        logged[ranks] = steps(config.output)
    if "fsdp" in kind:
        share = re.search(r"rank 0 holds ([\d,]+) of ([\d,]+) weights", said)
        assert share is not None, "FSDP did not share the model out"
        own, whole = (int(number.replace(",", "")) for number in share.groups())
        measured("share of the weights on a rank", own / whole, 0.6)
    assert len(logged[1]) == len(logged[2]) == 6
    for name in ("ce", "kl", "grad_norm"):
        errors = [abs(b[name] / a[name] - 1) for a, b in zip(logged[1], logged[2], strict=True)]
        measured(f"{name} off by", max(errors), BOUNDS[kind])


@pytest.mark.gpu(package="vllm")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tensor_parallelism(
    dtype: str, tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank takes the top-k of its own columns, then they are merged."""
    if REHEARSED:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    compare(peaked_model(tmp_path / "model"), DOCUMENTS, dtype, measured, tensor_parallel_size=2)


@pytest.mark.gpu(package="vllm")
def test_two_workers(tmp_path: Path, measured: Measured) -> None:
    """Two engines, each with a GPU and a partition, write the rows that one writes."""
    if REHEARSED:
        pytest.skip("two engines at a time are for two GPUs")
    model = peaked_model(tmp_path / "model")
    corpus: CorpusConfig = random_corpus(tmp_path / "general.parquet", LENGTHS, 2)
    found = {}
    for workers in (1, 2):
        config = DumpConfig(
            model=str(model), corpus=corpus, output=str(tmp_path / f"dump_{workers}"), k=16,
            max_length=1024, dtype="float32", partitions=2, workers=workers, engine_args=SHARE,
        )  # fmt: skip
        dump.run(config)
        found[workers] = rows(config.output)
    assert found[1].keys() == found[2].keys()
    measured("documents", len(found[2]), least=len(LENGTHS))
