"""The plug-in's inner step on plain tensors."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.teacher.sampling import NO_SAMPLES, Sampling

topk_model = pytest.importorskip("pipeline.teacher.topk_model", reason="needs vllm")


def test_every_architecture_keeps_its_name() -> None:
    """vLLM looks up hooks, dtypes and kernels by it: MODELS_CONFIG_MAP is one of the places."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    known = set(MODELS_CONFIG_MAP) & set(ModelRegistry.models)
    assert {"Mamba2ForCausalLM", "Gemma4ForConditionalGeneration", "GptOssForCausalLM"} <= known
    for name in ModelRegistry.models:
        classes = topk_model.class_overrides([name])
        assert classes[name] == f"pipeline.teacher.topk_model:TopK{name}"
    assert not topk_model.class_overrides(["NobodyKnowsForCausalLM"])
    # vLLM has no code of its own for it, and takes transformers'.
    assert "TransformersForCausalLM" in topk_model.class_overrides(["GPTNeoForCausalLM"])


def test_a_class_is_made_of_vllms_own_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the architecture is overridden already, as after a first dump in a process."""
    from vllm.model_executor.models import ModelRegistry

    name = "Qwen3ForCausalLM"
    topk_model.register()
    own = topk_model.original(name)
    monkeypatch.setitem(ModelRegistry.models, name, own)
    ModelRegistry.register_model(name, topk_model.class_overrides([name])[name])
    assert topk_model.original(name) is own
    made = topk_model.TopKQwen3ForCausalLM
    assert made.__name__ == name
    assert issubclass(made, own.load_model_cls())
    with pytest.raises(AttributeError):
        _ = topk_model.TopKNobodyKnowsForCausalLM


def test_the_full_logits_never_exist_at_once(
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

    packed = topk_model.pack_topk(Model(), torch.zeros(2000, 4), 4, NO_SAMPLES, vocab_size)
    assert packed.shape == (2000, 9)
    assert max(sizes) <= 1 << 25
    assert sum(sizes) == 4 * vocab_size * 2000
    tail = packed[:, 0].contiguous().view(torch.float32)
    torch.testing.assert_close(tail, torch.full((2000,), float(np.log(1 - 4 / vocab_size))))


class Steps:
    """The pooler with a model of 20 ids, and steps as vLLM makes them; `head` counts its rows."""

    def __init__(self, how: Sampling = NO_SAMPLES) -> None:
        torch.manual_seed(0)
        weight = torch.randn(6, 20)
        self.head: list[int] = []

        class Model:
            def compute_logits(_, hidden: torch.Tensor) -> torch.Tensor:
                self.head.append(len(hidden))
                return (hidden[:, :, None] * weight).sum(1)  # the same for any number of rows

        self.pooler = topk_model.TopKPooler(Model(), 3, how, 20)

    def run(self, parts: list[tuple[Any, Any, torch.Tensor, int]], length: int) -> list[Any]:
        """One step of sequences of `length` tokens: (params, state, all hidden states, start), each
        with the next 5 tokens."""
        from vllm.v1.pool.metadata import PoolingMetadata

        ends = [min(start + 5, length) for *_, start in parts]
        metadata = PoolingMetadata(
            prompt_lens=torch.full((len(parts),), length),
            prompt_token_ids=None,
            prompt_token_ids_cpu=None,
            pooling_params=[params for params, *_ in parts],
            pooling_states=[state for _, state, *_ in parts],
        )
        starts = [start for *_, start in parts]
        metadata.build_pooling_cursor(
            np.subtract(ends, starts), torch.tensor(ends), torch.device("cpu")
        )
        hidden = [states[a:b] for (_, _, states, a), b in zip(parts, ends, strict=True)]
        return list(self.pooler(torch.cat(hidden), metadata))


def asking(positions: list[int], tokens: int) -> Any:
    from vllm import PoolingParams

    asked = topk_model.asking_for(np.array(positions, np.int64), tokens)
    return PoolingParams(task="token_classify", extra_kwargs=asked)


@pytest.mark.parametrize("how", [NO_SAMPLES, Sampling(4, 1)])
def test_the_head_computes_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, how: Sampling
) -> None:
    """In pieces of 5 tokens, one of them without a target, and with a restart from 0 between."""
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingStates

    monkeypatch.setattr(topk_model, "get_tensor_model_parallel_world_size", lambda: 1)
    states = [torch.randn(12, 6) for _ in range(2)]
    trial = Steps(how)
    whole = [
        torch.cat(
            [
                trial.run([(PoolingParams(task="token_classify"), PoolingStates(), part, 0)], 5)[0]
                for part in each.split(5)[:2]
            ]
        )
        for each in states
    ]
    assert sum(trial.head) == 20  # a request that asks for nothing gets all rows
    steps, first, second = Steps(how), PoolingStates(), PoolingStates()
    one, other = asking([1, 3, 9], 12), asking([0, 5, 6, 7, 8, 9], 12)
    assert steps.run([(one, first, states[0], 0), (other, second, states[1], 0)], 12) == [None] * 2
    assert steps.head == [2 + 1]
    assert steps.run([(one, first, states[0], 5)], 12) == [None]
    assert steps.run([(one, first, states[0], 0)], 12) == [None]  # it was preempted
    assert steps.run([(other, second, states[1], 5), (one, first, states[0], 5)], 12) == [None] * 2
    assert steps.head == [3, 1, 2, 6]
    found = steps.run([(one, first, states[0], 10), (other, second, states[1], 10)], 12)
    assert steps.head == [3, 1, 2, 6], "a step without a target needs no head"
    for rows, at, packed in zip(([1, 3, 9], [0, 5, 6, 7, 8, 9]), whole, found, strict=True):
        assert packed.shape == (len(rows), 1 + 2 * 3 + how.draws)
        assert torch.equal(packed, at[rows])


@pytest.mark.parametrize("k", [0, 4, 42])
def test_several_ranks_draw_as_one_would(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Three ranks have a third of the columns each. An id of the tail is drawn N · p times, rounded
    down or up."""
    draws, size, tokens = 24, 42, 300
    torch.manual_seed(0)
    logits = torch.randn(tokens, size) * 2
    spans = [(0, 14), (14, 28), (28, size)]
    how = Sampling(draws, 7)
    world = Ranks(len(spans))
    monkeypatch.setattr(topk_model, "get_tensor_model_parallel_world_size", lambda: len(spans))
    monkeypatch.setattr(topk_model, "get_tensor_model_parallel_rank", lambda: world.rank())
    monkeypatch.setattr(topk_model, "tensor_model_parallel_all_gather", world.gather)
    monkeypatch.setattr(topk_model, "local_logits", lambda parts, _: (parts[0].clone(), parts[1]))
    answers = world.run(
        [
            lambda span=span: topk_model.pack_rows(  # type: ignore[misc]
                (logits[:, slice(*span)], span[0]), torch.zeros(tokens, 1), k, how
            )
            for span in spans
        ]
    )
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    packed = answers[0]
    assert packed.shape == (tokens, 1 + 2 * k + draws)
    best, ids = logits.log_softmax(-1).topk(k)
    assert torch.equal(packed[:, 1 + k : 1 + 2 * k].long(), ids)
    torch.testing.assert_close(packed[:, 1 : 1 + k].contiguous().view(torch.float32), best)
    drawn = packed[:, 1 + 2 * k :].long()
    if k == size:
        assert (drawn == -1).all()
        return
    expected = draws * logits.double().scatter(1, ids, -torch.inf).softmax(-1)
    found = torch.zeros_like(expected).scatter_add(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    assert (found >= (expected - 1e-4).floor()).all()
    assert (found <= (expected + 1e-4).ceil()).all()


class Ranks:
    """Threads that act as ranks and gather from each other."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number, timeout=30)
        self.given: list[torch.Tensor] = [torch.empty(0)] * number
        self.local = threading.local()

    def rank(self) -> int:
        found: int = self.local.rank
        return found

    def gather(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        self.given[self.rank()] = value
        self.barrier.wait()
        every = torch.cat(self.given, dim)
        self.barrier.wait()
        return every

    def run(self, work: list[Any]) -> list[torch.Tensor]:
        def one(rank: int) -> torch.Tensor:
            self.local.rank = rank
            done: torch.Tensor = work[rank]()
            return done

        with ThreadPoolExecutor(len(work)) as pool:
            return list(pool.map(one, range(len(work))))
