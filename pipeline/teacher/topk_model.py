"""The vLLM plug-in: any language model as a pooling model that returns its top-k.

`register` is this package's entry point in vllm.general_plugins. For an architecture "X", the class
"TopKX" of this module is X's own class with a pooler that applies X's own head to the positions
that predict a target and returns, for each of them, int32 [1 + 2k + N]: the tail's log-probability,
k log-probabilities, k ids (floats bit-cast), and, if the dump has samples, N ids drawn from the
tail (sampling.py). All values stay in tensors: there is no Python object per entry.

An engine that dumps is started with `class_overrides`: vLLM then makes "TopKX" wherever it would
make X. The architecture keeps its name, because vLLM looks up far more than the class by it: the
dtypes of caches and states, ALiBi, kernels, defaults (MODELS_CONFIG_MAP and many more places).
An override lasts as long as the process; a class whose config has no `topk_k` is X, unchanged.

It uses these interfaces of vLLM 0.32: ModelRegistry, model_class_overrides, Pooler,
VllmModelForPooling, PoolingMetadata.get_pooling_cursor, pooling_states and pooling_params,
PoolingParams.extra_kwargs, LogitsProcessor, ParallelLMHead, get_tensor_model_parallel_rank and
tensor_model_parallel_all_gather.
"""

import os
import re
import signal
from collections.abc import Set
from typing import Any

import numpy as np
import torch
import transformers
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces_base import VllmModelForPooling

from pipeline.devices import to_device
from pipeline.signals import die_with_parent
from pipeline.teacher import stand_in
from pipeline.teacher.head import CACHE_BYTES, as_integers, rows_at_a_time, top_and_rest
from pipeline.teacher.sampling import NO_SAMPLES, NONE, Sampling, draw, places
from pipeline.types import Int64s

PREFIX = "TopK"
BY_TRANSFORMERS = re.compile(r"Transformers\w*ForCausalLM")
registered = False  # set by `register`: whether vLLM has loaded this plug-in in this process
originals: dict[str, Any] = {}  # set by `register`: vLLM's own entries, by architecture
POSITIONS = "mol_positions"  # what a request asks for, in PoolingParams.extra_kwargs
OWNER = "MOL_DUMP_PID"  # id of the process that owns the engine
# Bytes of float32 logits in memory at a time: enough rows for a fast matrix product.
LOGITS_BYTES, LOGITS_BYTES_CPU = 1 << 30, 1 << 28


def register() -> None:
    """Keep vLLM's own classes at hand, and tie this process to the dump that owns the engine.

    vLLM calls this in each of its processes. Those of a dump get stand-ins for packages of images
    and sound, and never ask whether to run a model's code. Its engine processes die with the dump,
    and ignore SIGINT from a terminal: the dump handles it.
    """
    global registered
    registered = True
    originals.update({name: of for name, of in ModelRegistry.models.items() if not is_own(of)})
    owner = os.environ.get(OWNER)
    if owner:
        stand_in.install()
        transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # nor is anybody there to ask
    if owner and int(owner) != os.getpid():
        die_with_parent(signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def class_overrides(architectures: list[str]) -> dict[str, str]:
    """vLLM's `model_class_overrides` for a model of these architectures; empty for unknown ones.

    A model that vLLM has no code for runs through transformers', under the name of the class for
    that.
    """
    known = [name for name in architectures if name in ModelRegistry.models]
    if known or not set(architectures).isdisjoint(dir(transformers)):
        known += [name for name in ModelRegistry.models if BY_TRANSFORMERS.fullmatch(name)]
    return {name: f"{__name__}:{PREFIX}{name}" for name in known}


def __getattr__(name: str) -> type:
    """Make the class "TopKX" when vLLM asks for it."""
    architecture = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or architecture not in ModelRegistry.models:
        raise AttributeError(name)
    made = make_class(original(architecture).load_model_cls())
    globals()[name] = made
    return made


def original(architecture: str) -> Any:
    """vLLM's entry for an architecture, whatever overrides it now."""
    found = ModelRegistry.models[architecture]
    return originals[architecture] if is_own(found) else found


def is_own(entry: Any) -> bool:
    """Whether an entry of the registry is a class of this module."""
    return getattr(entry, "module_name", None) == __name__


def make_class(base: Any) -> type:
    class TopKModel(base, VllmModelForPooling):
        is_pooling_model = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            asked = vllm_config.model_config.hf_config
            if not hasattr(asked, "topk_k"):
                return  # an engine that does not dump, or the language model within a wrapper
            how = Sampling(int(asked.topk_samples), int(asked.topk_seed))
            size = vllm_config.model_config.get_vocab_size()
            self.pooler = TopKPooler(self, int(asked.topk_k), how, size)
            keep_quantised_head(self)

    # vLLM looks up by the class's name, too.
    TopKModel.__name__, TopKModel.__qualname__ = base.__name__, base.__qualname__
    return TopKModel


class TopKPooler(Pooler):
    """Hidden states of a step -> the packed answers of each finished sequence."""

    def __init__(self, model: Any, k: int, how: Sampling, vocab_size: int) -> None:
        super().__init__()
        # A closure holds the model: as a child module, the model would contain itself.
        self.pack = lambda hidden: pack_topk(model, hidden, k, how, vocab_size)

    def get_supported_tasks(self) -> Set[Any]:
        return {"token_classify"}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[Any]:
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.numpy()
        starts = cursor.seq_lens_cpu.numpy() - scheduled
        requests = pooling_metadata.pooling_params
        chosen = list(map(asked_rows, requests, starts.tolist(), scheduled.tolist()))
        before = np.cumsum(scheduled) - scheduled  # rows of other sequences in front
        rows = np.concatenate([at + first for at, first in zip(chosen, before, strict=True)])
        packed = self.pack(rows_of(hidden_states, rows))
        parts = packed.split([len(at) for at in chosen])
        finished = cursor.is_finished().tolist()
        results: list[Any] = []
        for part, start, done, state in zip(
            parts, starts.tolist(), finished, pooling_metadata.pooling_states, strict=True
        ):
            if start == 0:
                # A preempted sequence restarts, but vLLM keeps the parts of its first attempt.
                # Without this, its rows would be duplicated silently (vLLM PR #55192).
                state.clean()
            state.hidden_states_cache.append(part)
            if done:
                results.append(torch.cat(state.hidden_states_cache))
                state.clean()
            else:
                results.append(None)
        return results


def asking_for(positions: Int64s, tokens: int) -> dict[str, bytes]:
    """`extra_kwargs` of a request of so many tokens: a bit for each, set at the positions [P].

    They pass between processes, so they are bytes, lowest bit first.
    """
    bits = np.zeros(tokens, bool)
    bits[positions] = True
    return {POSITIONS: np.packbits(bits, bitorder="little").tobytes()}


def asked_rows(params: Any, start: int, tokens: int) -> Int64s:
    """Which rows of a request's part in a step are asked for; the part has `tokens` from `start`.

    All where the request does not say: so vLLM's trial step takes as much memory as any.
    """
    asked = (params.extra_kwargs or {}).get(POSITIONS)
    if asked is None:
        return np.arange(tokens)
    bits = np.unpackbits(np.frombuffer(asked, np.uint8), bitorder="little")
    return np.flatnonzero(bits[start : start + tokens])


def rows_of(hidden_states: torch.Tensor, rows: Int64s) -> torch.Tensor:
    """The rows of hidden_states [T, D]; all of them where there are as many."""
    if len(rows) == len(hidden_states):
        return hidden_states
    return hidden_states[to_device(torch.from_numpy(rows), hidden_states.device)]


def pack_topk(
    model: Any, hidden_states: torch.Tensor, k: int, how: Sampling, vocab_size: int
) -> torch.Tensor:
    """hidden_states [P, D] -> int32 [P, 1 + 2k + N].

    Full-vocabulary logits take at most LOGITS_BYTES at a time, whatever the vocabulary and the
    number of tokens in a step. A step without a target does not run the head.
    """
    if not len(hidden_states):
        return hidden_states.new_empty((0, 1 + 2 * k + how.draws), dtype=torch.int32)
    on_cpu = hidden_states.device.type == "cpu"
    rows = rows_at_a_time(LOGITS_BYTES_CPU if on_cpu else LOGITS_BYTES, vocab_size)
    return torch.cat([pack_rows(model, part, k, how) for part in hidden_states.split(rows)])


def pack_rows(
    model: Any, hidden_states: torch.Tensor, k: int, how: Sampling = NO_SAMPLES
) -> torch.Tensor:
    """Top-k, tail and samples of the full distribution, from each rank's share of the vocabulary.

    Each rank takes the top-k and the logsumexp of its own columns. The ranks gather 2k + 1 numbers
    per row, and N ids if sampling, but never the logits. The k best of the whole vocabulary are
    among the ranks' k best.
    """
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        logits = exact(model.compute_logits(hidden_states), how)
        best, ids, rest = top_and_rest(logits, k)
        shares, first, rank = rest[:, None], 0, 0
    else:
        logits, first = local_logits(model, hidden_states)
        logits, rank = exact(logits, how), get_tensor_model_parallel_rank()
        own_best, own_ids, own_rest = top_and_rest(logits, k)
        share = [own_rest[:, None], own_best, (own_ids + first).int().view(torch.float32)]
        parts = tensor_model_parallel_all_gather(torch.cat(share, dim=1), dim=-1).chunk(ranks, -1)
        width = own_best.shape[1]
        every = torch.cat([part[:, 1 : 1 + width] for part in parts], dim=1)
        every_id = torch.cat([part[:, 1 + width :] for part in parts], dim=1)
        best, where = every.topk(min(k, every.shape[1]), dim=-1)
        ids = every_id.contiguous().view(torch.int32).gather(1, where)
        left = every.scatter(1, where, -torch.inf)  # candidates outside the overall top-k
        # logsumexp of each rank's part of the tail [T, ranks].
        lefts = [left[:, width * other : width * (other + 1)] for other in range(ranks)]
        shares = torch.stack(
            [
                torch.cat([part[:, :1], candidates], dim=1).logsumexp(-1)
                for part, candidates in zip(parts, lefts, strict=True)
            ],
            dim=1,
        )
        rest = shares.logsumexp(-1)
        if how.draws:  # this rank's candidates outside the overall top-k belong to the tail
            logits.scatter_(1, own_ids, lefts[rank])
    total = torch.logaddexp(best.logsumexp(-1), rest)
    answers = as_integers(best, ids, rest, total)
    if not how.draws:
        return answers
    drawn = drawn_from(logits, shares, rank, first, places(how, rest, total))
    return torch.cat([answers, drawn], dim=1)


def exact(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """float32 if sampling: `top_and_rest` then masks the kept ids in place."""
    return logits.float() if how.draws else logits


def drawn_from(
    logits: torch.Tensor, shares: torch.Tensor, rank: int, first: int, at: torch.Tensor
) -> torch.Tensor:
    """int32 [T, N]: the ids at the points `at` [T, N] of the tail's cumulative distribution.

    logits  [T, columns]  this rank's part of the tail, from id `first` on; they are overwritten
    shares  [T, ranks]    logsumexp of each rank's part

    The parts of the ranks follow each other on the cumulative distribution, so each point belongs
    to one rank.
    """
    mass = shares.double().softmax(-1)
    ends = mass.cumsum(-1)
    ends[:, -1] = 1
    start = ends[:, rank - 1 : rank] if rank else torch.zeros_like(at[:, :1])
    mine = (at >= start) & (at < ends[:, rank : rank + 1])
    inside = ((at - start) / (ends[:, rank : rank + 1] - start)).clamp(0, 1)
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = rows_at_a_time(CACHE_BYTES, logits.shape[1])
    pieces = zip(*(value.split(rows) for value in (logits, inside, shares[:, rank])), strict=True)
    ids = torch.cat([draw(*piece) for piece in pieces]).int()
    ids = torch.where(mine & (ids != NONE), ids + first, NONE)
    if shares.shape[1] > 1:
        every = tensor_model_parallel_all_gather(ids.view(torch.float32), dim=-1)
        ids = every.view(torch.int32).view(len(ids), -1, at.shape[1]).amax(1)
    return ids


def inner_model(model: Any) -> Any:
    """The submodel with the head: the model itself, or the language model of a wrapper."""
    for part in model.modules():
        if isinstance(getattr(part, "logits_processor", None), LogitsProcessor):
            return part
    raise ValueError(f"{type(model).__name__} has no head over a vocabulary")


def head_of(model: Any) -> Any:
    """The language model's head; if tied, it may be the embedding."""
    inner = inner_model(model)
    named = getattr(inner, "lm_head", None)
    found = [named, *inner.modules()]
    heads = [part for part in found if isinstance(part, ParallelLMHead)]
    embeddings = [part for part in found if isinstance(part, VocabParallelEmbedding)]
    return (heads or embeddings)[0]


def keep_quantised_head(model: Any) -> None:
    """Leave a quantised head in its own dtype: it fails in float32, which vLLM sets for pooling.

    float32 is right for all other heads: bfloat16 inputs, float32 sums and logits (vLLM #48390).
    """
    if not get_pp_group().is_last_rank:
        return  # the head lives on the last rank
    method = type(getattr(head_of(model), "quant_method", None)).__name__
    if not method.startswith("Unquantized"):
        inner_model(model).logits_processor.head_dtype = None


def local_logits(model: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(this rank's columns of the logits without padding, id of the first column)."""
    head = head_of(model)
    logits = inner_model(model).logits_processor(head, hidden_states, skip_gather=True)
    shard = head.shard_indices
    size = shard.org_vocab_end_index - shard.org_vocab_start_index
    return logits[:, :size], shard.org_vocab_start_index
