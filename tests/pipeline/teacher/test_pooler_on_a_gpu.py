"""The pooler on fake tensors of a GPU: what it returns, and that the host never waits for it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.teacher import head_triton
from pipeline.teacher.sampling import NO_SAMPLES, Sampling
from tests.helpers.fake_cuda import FakeCuda, fake_cuda

topk_model = pytest.importorskip("pipeline.teacher.topk_model", reason="needs vllm")

K, V, D = 8, 5000, 16
TOKENS = 7
"""Of each of two sequences in a step."""


class FakeGroups:
    """In place of `head_triton._groups`: checks what a launch would read and write."""

    def __init__(self, mode: FakeCuda) -> None:
        self.mode = mode
        self.launches = 0

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return lambda *given, **constants: self.launch(grid, *given, **constants)

    def launch(
        self, grid: tuple[int, int], logits: Tensor, top: Tensor, lse: Tensor,
        groups: int, stride: int, MEMBERS: int, SIZE: int, num_warps: int,
    ) -> None:  # fmt: skip
        self.launches += 1
        # Triton takes the current device.
        assert {x.device for x in (logits, top, lse)} == {torch.device("cuda", self.mode.device)}
        assert logits.stride() == (stride, 1)
        assert groups * MEMBERS <= logits.shape[1]
        assert grid[0] == len(logits)
        assert (grid[1] - 1) * SIZE < groups <= grid[1] * SIZE
        assert MEMBERS.bit_count() == SIZE.bit_count() == num_warps.bit_count() == 1
        for made in (top, lse):
            assert made.shape == (len(logits), groups)
            assert made.is_contiguous()
            assert made.dtype == torch.float32


def step(model: Any, how: Sampling, dtype: torch.dtype, chosen: list[int] | None) -> Tensor:
    """The packed rows of a step of two sequences; of the second, `chosen` are asked for."""
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    asked = {} if chosen is None else topk_model.asking_for(np.array(chosen, np.int64), TOKENS)
    params = [PoolingParams(task="token_classify", extra_kwargs=extra) for extra in ({}, asked)]
    lengths = torch.full((2,), TOKENS)
    metadata = PoolingMetadata(lengths, None, None, params, [PoolingStates(), PoolingStates()])
    starts = torch.empty(3, dtype=torch.int64, device="cuda")
    metadata.build_pooling_cursor(lengths.numpy(), lengths, torch.device("cuda", 0), starts)
    hidden = torch.empty(2 * TOKENS, D, dtype=dtype, device="cuda")
    return torch.cat(topk_model.TopKPooler(model, K, how, V)(hidden, metadata))


@pytest.mark.parametrize("how", [NO_SAMPLES, Sampling(5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chosen", [None, [1, 4], []])
def test_pooler_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    how: Sampling,
    dtype: torch.dtype,
    ranks: int,
    chosen: list[int] | None,
) -> None:
    monkeypatch.setattr(topk_model, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(topk_model, "get_tensor_model_parallel_rank", lambda: ranks - 1)
    monkeypatch.setattr(
        topk_model, "tensor_model_parallel_all_gather", lambda part, dim: torch.cat([part] * 2, dim)
    )
    monkeypatch.setattr(
        topk_model, "local_logits", lambda model, hidden: (model.compute_logits(hidden), V)
    )
    with fake_cuda() as mode:
        kernel = FakeGroups(mode)
        monkeypatch.setattr(head_triton, "_groups", kernel)
        head = torch.empty(D, V, dtype=dtype, device="cuda")
        model = SimpleNamespace(compute_logits=lambda hidden: hidden @ head)
        packed = step(model, how, dtype, chosen)
        rows = TOKENS + (TOKENS if chosen is None else len(chosen))
        assert packed.shape == (rows, 1 + 2 * K + how.draws)
        assert packed.dtype == torch.int32
        assert packed.device.type == "cuda"
        assert mode.waits == []
        assert len(mode.pinned) == (0 if chosen is None else 1)
        assert kernel.launches == 1
