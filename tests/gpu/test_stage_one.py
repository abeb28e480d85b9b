"""Stage one under vLLM on the device, in every way an engine computes, against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.agreement import FEW, ROUNDING
from pipeline.corpus import Sequence
from pipeline.models.directory import ModelFolder
from pipeline.teacher.teacher import TransformersTeacher
from storage import TopK
from tests.gpu.device import REHEARSED
from tests.gpu.measured import Measured
from tests.gpu.runs import random_model

pytestmark = pytest.mark.gpu(package="vllm", seconds=300)

K = 32
LENGTHS = [2, 3, 127, 128, 129, 300, 900, 5, 640] + [50] * 20
SHARE = {} if REHEARSED else {"gpu_memory_utilization": 0.15}
"""Other checks run beside this one."""
WAYS: dict[str, dict[str, Any]] = {
    "compiled, CUDA graphs": {"enforce_eager": False},
    "eager": {"enforce_eager": True},
    "chunked": {"max_num_batched_tokens": 128},
}


def sequences(lengths: list[int], vocabulary: int) -> list[Sequence]:
    """Random documents; every third one has targets in its second half alone."""
    rng = np.random.default_rng(0)
    found = []
    for number, length in enumerate(lengths):
        ids = rng.integers(1, vocabulary, length).astype(np.int32)
        targets = None if number % 3 else np.arange(length) >= length // 2
        found.append(Sequence(str(number), number, 0, ids, True, targets))
    return found


def divergence(found: TopK, exact: TopK) -> float:
    """Sum of the KL of `found`, on its entries and tail, to whole distributions, in nats."""
    total = 0.0
    every = np.full((len(exact), exact.counts[0]), -np.inf)
    ids, logprobs = exact.dense()
    np.put_along_axis(every, ids, logprobs.astype(np.float64), 1)
    for at, (kept, values) in enumerate(zip(*found.dense(), strict=True)):
        p, q = np.exp(values.astype(np.float64)), np.exp(every[at, kept])
        a, b = np.exp(float(found.tail_logprob[at])), max(1 - q.sum(), 1e-30)
        total += float((p * np.log(p / q)).sum()) + (a * np.log(a / b) if a > 0 else 0.0)
    return total


def compare(
    model: Path, lengths: list[int], dtype: str, measured: Measured, **engine_args: Any
) -> None:
    """The engine's answers against transformers in float32: the mean KL, and the rows."""
    folder = ModelFolder(model)
    given = sequences(lengths, 512)
    whole = TransformersTeacher(folder, folder.vocab_size, "float32")  # before vLLM starts
    exact = [topk for _, topk in whole.topk(iter(given))]
    del whole
    from pipeline.teacher.vllm_teacher import Pooled, VllmTeacher

    with VllmTeacher(folder, K, 1024, dtype, 64, {**SHARE, **engine_args}) as teacher:
        assert isinstance(teacher.path, Pooled), "the plug-in did not load"
        pairs = list(teacher.topk(iter(given)))
    assert [sequence.doc_id for sequence, _ in pairs] == [one.doc_id for one in given]
    rows = [len(topk) for _, topk in pairs]
    assert rows == [len(one.positions) for one in given]
    total = sum(divergence(found, one) for (_, found), one in zip(pairs, exact, strict=True))
    bound = FEW * (ROUNDING["float32"] + ROUNDING[dtype])
    measured("mean KL to transformers", total / sum(rows), bound, unit="nats")
    tail = np.concatenate([topk.tail_logprob for _, topk in pairs])
    measured("mass of the k best", 1 - np.exp(tail).mean(), least=0.3)


def peaked_model(path: Path) -> Path:
    """Its k best tokens hold most of the mass, as a language model's do. Its weights are bfloat16,
    so that rounding them is no engine's fault."""
    return random_model(path, torch.bfloat16, initializer_range=0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaked_model(tmp_path_factory.mktemp("stage_one") / "model")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("way", WAYS)
def test_the_engine_agrees(way: str, dtype: str, model: Path, measured: Measured) -> None:
    """Top-k and tail of each document, also of targets alone."""
    compare(model, LENGTHS, dtype, measured, **WAYS[way])


def test_preempted(model: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KV cache holds fewer sequences than run, so some start again from 0."""
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    preempt, preempted = Scheduler._preempt_request, []

    def counted(*arguments: Any, **options: Any) -> Any:
        preempted.append(None)
        return preempt(*arguments, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    tokens, block = 2304, 128 if REHEARSED else 16
    compare(
        model, [700] * 12, "bfloat16", measured, max_num_batched_tokens=512,
        long_prefill_token_threshold=64, max_num_seqs=12, block_size=block,
        num_gpu_blocks_override=tokens // block,
    )  # fmt: skip
    measured("preemptions", len(preempted), least=1)


def test_prompt_logprobs(model: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way for models that the plug-in cannot wrap gives the same answers."""
    from pipeline.teacher import vllm_teacher

    monkeypatch.setattr(vllm_teacher, "class_overrides", lambda architectures: {})
    monkeypatch.setattr(vllm_teacher, "Pooled", vllm_teacher.PromptLogprobs)
    compare(model, LENGTHS, "bfloat16", measured)
