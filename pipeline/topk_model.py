"""The vLLM plug-in: any causal language model as a pooling model that returns its top-k.

`register` is this package's entry point in vllm.general_plugins. For an architecture "X" the model
"TopKX" is X itself with a pooler that applies X's own head to every position and returns, per
position, int32 [1 + 2k]: the tail's log-probability, k log-probabilities, k ids (floats bit-cast).
Tensors all the way: no Python object per entry.

Interfaces of vLLM 0.32 that are used: ModelRegistry, Pooler, VllmModelForPooling,
PoolingMetadata.get_pooling_cursor and pooling_states, the model's logits_processor and lm_head,
tensor_model_parallel_all_gather.
"""

from collections.abc import Set
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces_base import VllmModelForPooling

PREFIX = "TopK"
ROWS = 1024  # positions whose full-vocabulary logits exist at a time


def register() -> None:
    """Make "TopKX" known for every text-generation architecture X that vLLM knows."""
    for name in list(ModelRegistry.get_supported_archs()):
        if name.endswith("ForCausalLM") and not name.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")


def __getattr__(name: str) -> type:
    """Make the class "TopKX" when vLLM asks for it."""
    if not name.startswith(PREFIX) or not name.endswith("ForCausalLM"):
        raise AttributeError(name)
    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    made = make_class(name, base)
    globals()[name] = made
    return made


def make_class(name: str, base: type) -> type:
    class TopKModel(base, VllmModelForPooling):
        is_pooling_model = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            k = int(vllm_config.model_config.hf_config.topk_k)
            self.pooler = TopKPooler(self, k)

    TopKModel.__name__ = TopKModel.__qualname__ = name
    return TopKModel


class TopKPooler(Pooler):
    """Hidden states of a step -> for each finished sequence, its packed top-k [T, 1 + 2k]."""

    def __init__(self, model: Any, k: int) -> None:
        super().__init__()
        self.k = k
        # In a closure: as a child module the model would contain itself.
        self.pack = lambda hidden: pack_topk(model, hidden, k)

    def get_supported_tasks(self) -> Set[Any]:
        return {"token_classify"}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[Any]:
        cursor = pooling_metadata.get_pooling_cursor()
        packed = self.pack(hidden_states)
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        starts = (cursor.seq_lens_cpu - cursor.num_scheduled_tokens_cpu).tolist()
        finished = cursor.is_finished().tolist()
        results: list[Any] = []
        for part, start, done, state in zip(
            packed.split(scheduled), starts, finished, pooling_metadata.pooling_states, strict=True
        ):
            if start == 0:
                # A sequence that was preempted starts anew, but vLLM keeps the parts of its first
                # attempt: without this its rows are doubled, silently (vLLM PR #55192).
                state.clean()
            state.hidden_states_cache.append(part)
            if done:
                results.append(torch.cat(state.hidden_states_cache))
                state.clean()
            else:
                results.append(None)
        return results


def pack_topk(model: Any, hidden_states: torch.Tensor, k: int) -> torch.Tensor:
    """hidden_states [N, D] -> int32 [N, 1 + 2k]; at most ROWS full-vocabulary rows at a time."""
    return torch.cat([pack_rows(model, rows, k) for rows in hidden_states.split(ROWS)])


def pack_rows(model: Any, hidden_states: torch.Tensor, k: int) -> torch.Tensor:
    """Top-k and tail of the full distribution, from each rank's share of the vocabulary.

    Each rank takes the top-k and the logsumexp of its own columns; 2k + 1 numbers per row are
    gathered, never the logits. The k best of the whole are among the ranks' k best.
    """
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        logits = model.compute_logits(hidden_states).float()
        best, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
        rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1)
    else:
        logits, first = local_logits(model, hidden_states)
        best, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
        rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1)
        ids = ids + first
        share = torch.cat([rest[:, None], best, ids.int().view(torch.float32)], dim=1)
        shares = tensor_model_parallel_all_gather(share, dim=-1).chunk(ranks, dim=-1)
        width = best.shape[1]
        rests = [part[:, :1] for part in shares]
        every = torch.cat([part[:, 1 : 1 + width] for part in shares], dim=1)
        every_id = torch.cat([part[:, 1 + width :] for part in shares], dim=1)
        best, where = every.topk(min(k, every.shape[1]), dim=-1)
        left = every.scatter(1, where, -torch.inf)  # candidates that did not make it
        rest = torch.cat([*rests, left], dim=1).logsumexp(-1)
        ids = every_id.contiguous().view(torch.int32).gather(1, where)
    total = torch.logaddexp(best.logsumexp(-1), rest)
    values = torch.cat([(rest - total)[:, None], best - total[:, None]], dim=1)
    return torch.cat([values.contiguous().view(torch.int32), ids.int()], dim=1)


def local_logits(model: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's columns of the logits, its padding removed, and the id of its first column."""
    inner = model
    while not hasattr(inner, "logits_processor"):
        inner = inner.language_model  # multimodal wrappers
    head = getattr(inner, "lm_head", None)
    if head is None or not hasattr(head, "shard_indices"):
        head = inner.model.embed_tokens  # tied
    logits = inner.logits_processor(head, hidden_states, skip_gather=True).float()
    shard = head.shard_indices
    size = shard.org_vocab_end_index - shard.org_vocab_start_index
    return logits[:, :size], shard.org_vocab_start_index


def unpack(packed: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int32 [T, 1 + 2k] -> tail_logprob [T], logprobs [T, k], ids [T, k]; views, no copy."""
    values = packed[:, : 1 + k].view(torch.float32)
    return values[:, 0], values[:, 1:], packed[:, 1 + k :]
