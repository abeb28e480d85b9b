"""The plug-in's inner step on plain tensors, and what a vLLM of another make is told."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline import teacher
from pipeline.config import ConfigError
from pipeline.corpus import Sequence

topk_model = pytest.importorskip("pipeline.topk_model", reason="needs vllm")


@pytest.mark.parametrize("size", [5, 64, 1000, 4099, 33_000])
@pytest.mark.parametrize("k", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_and_rest_of_any_shape(size: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size + k)
    logits = (torch.randn(7, size) * 4).to(dtype)
    logits[0, : size // 2] = 80  # a row of ties, and a tail far below the head
    logits[1, 0] = 200
    exact = logits.double()
    best, ids, rest = topk_model.top_and_rest(logits.clone(), k)
    wanted = exact.topk(min(k, size)).values
    torch.testing.assert_close(best.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(exact.gather(1, ids), wanted)
    assert all(len(set(row.tolist())) == min(k, size) for row in ids)
    others = exact.scatter(1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(rest.double(), others, rtol=1e-6, atol=1e-5)


def test_columns_that_cannot_be_have_no_mass() -> None:
    logits = torch.full((2, 3000), -torch.inf)
    logits[:, 7], logits[:, 2999] = 1.0, 2.0
    best, ids, rest = topk_model.top_and_rest(logits, 2)
    assert ids.tolist() == [[2999, 7]] * 2
    assert best.tolist() == [[2.0, 1.0]] * 2
    assert torch.isneginf(rest).all()


def test_nan_stays_nan() -> None:
    logits = torch.randn(3, 3000)
    logits[1, 1234] = torch.nan
    best, _, rest = topk_model.top_and_rest(logits, 4)
    assert torch.isnan(best[1]).any() or torch.isnan(rest[1])


def test_the_full_logits_of_a_large_vocabulary_never_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """151,936 ids, 2,000 rows: 1.2 GB in float32, of which 32 MiB exist at a time."""
    monkeypatch.setattr(topk_model, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(topk_model, "LOGITS_BYTES_CPU", 1 << 25)
    sizes, vocab_size = [], 151_936

    class Model:
        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            sizes.append(4 * vocab_size * len(hidden))
            return hidden[:, :1].expand(-1, vocab_size).clone()

    packed = topk_model.pack_topk(Model(), torch.zeros(2000, 4), 4, vocab_size)
    assert packed.shape == (2000, 9)
    assert max(sizes) <= 1 << 25
    assert sum(sizes) == 4 * vocab_size * 2000
    tail = packed[:, 0].contiguous().view(torch.float32)
    torch.testing.assert_close(tail, torch.full((2000,), float(np.log(1 - 4 / vocab_size))))


def test_another_vllm_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher.check_interface()
    other = [
        ("vllm", "LLMEngine.add_request", "request_id colour"),
        ("vllm", "LLMEngine.fly", ""),
        ("vllm.nowhere", "Thing", ""),
    ]
    monkeypatch.setattr(teacher, "VLLM_INTERFACE", other)
    with pytest.raises(ConfigError) as refused:
        teacher.check_interface()
    for words in ("add_request: no parameter colour", "LLMEngine.fly", "vllm.nowhere", "0.32"):
        assert words in str(refused.value)


def test_rows_that_do_not_fit_are_refused() -> None:
    class Output:
        class outputs:
            data = torch.zeros(9, 33, dtype=torch.int32)

    sequence = Sequence("7", 7, 0, np.zeros(5, np.int32), True)
    output: Any = Output
    with pytest.raises(RuntimeError, match=r"returned \(9, 33\) for 5 tokens"):
        teacher.Pooled(16).answer(sequence, output)
