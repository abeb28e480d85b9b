"""Attention within the sequences of a packed row: no T × T mask, no padding, no leaks.

transformers separates packed sequences with a T × T mask, so a row costs as much attention as one
sequence of its length. Here each sequence is attended separately, so a row costs the sum of its
sequences. Where attention is plain, sdpa attends each, or one kernel many short ones (varlen.py).
What a model hands its attention beyond that (a soft cap, sinks) both ignore, so there the
eager function of the model's own code attends.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.models import varlen

PACKED = "packed_sequences"
PACKED_EAGER = "packed_sequences_eager"
"""The same with the model's own eager function everywhere."""
PACKED_ON_META = "packed_sequences_on_meta"
"""PACKED for tensors without values: there are no windows."""

NEUTRAL = {"dropout", "scaling", "is_causal", "sliding_window", "layer_idx", "position_ids"}
NEUTRAL |= {"position_embeddings", "cache_position", "past_key_values", "use_cache", "return_dict"}
NEUTRAL |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "logits_to_keep"}
NEUTRAL |= {"output_attentions", "output_hidden_states", "output_router_logits"}
NEUTRAL |= {"num_items_in_batch"}
"""Options of an attention function that sdpa knows, or that do not change what it computes. Any
other one might, so the model's own function takes it. The mask holds the window."""


@dataclass
class Notes:
    """What a model asked of PACKED in the forwards within `noting`."""

    calls: int = 0
    special: set[str] = field(default_factory=set)
    """options that sdpa would ignore"""
    windows: set[int] = field(default_factory=set)
    """sliding windows, in tokens"""
    odd_masks: bool = False
    """a mask is neither causal nor a causal window, such as a chunk or a prefix"""


_notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


@contextmanager
def noting() -> Iterator[Notes]:
    notes = Notes()
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


@contextmanager
def told_apart() -> Iterator[None]:
    """A forward that is given `sequence_lengths`: transformers does not look for them.

    It would ask position_ids on the host, which waits for the GPU at each forward. A compiler does
    not let it ask.
    """
    if torch.compiler.is_compiling():
        yield
        return
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


@torch.compiler.disable  # torch.compile would compile again for each list of lengths
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: list[int] | None = None,
    own: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query [B, H, T, D] to key, value [B, H_kv, S, D] -> [B, T, H, D].

    With sequence_lengths, T = S is their sum and no sequence sees another. Without them, each row
    is one sequence. `own` takes the model's own eager function whatever the options are.
    """
    special = {
        name
        for name, option in options.items()
        if name not in NEUTRAL and option is not None and option is not False
    }
    if (notes := _notes.get()) is not None:
        notes.calls += 1
        notes.special |= special
    own = own or bool(special)
    attend = own_attention(module) if own else sdpa
    if sequence_lengths is None:
        mask = mask_of(module, query, key, attention_mask, 0, own, options)
        return attend(module, query, key, value, mask, **options)[0], None
    if not own and is_plain(module, attention_mask, options) and varlen.fits(query, key, value):
        window = None if attention_mask is None else int(attention_mask)
        if varlen.pays(sequence_lengths, window):
            scale = options.get("scaling")
            return varlen.attend(query, key, value, sequence_lengths, window, scale), None
    parts, start = [], 0
    for q, k, v in zip(*(x.split(sequence_lengths, 2) for x in (query, key, value)), strict=True):
        mask = mask_of(module, q, k, attention_mask, start, own, options)
        parts.append(attend(module, q, k, v, mask, **options)[0])
        start += q.shape[2]
    return torch.cat(parts, dim=1), None


def sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, without groups of queries where no fast kernel of torch takes them.

    On a GPU only FlashAttention takes groups. Elsewhere, as in float32, torch would compute each
    score one by one, and save T × T of them for the backward. Keys and values that are repeated
    for their group go to the memory-efficient kernel.
    """
    many = query.shape[1] // key.shape[1]
    given: Any = module
    if many > 1 and mask is None and query.is_cuda and not varlen.flash(query):
        key, value = (x.repeat_interleave(many, 1) for x in (key, value))
        given = SimpleNamespace(is_causal=is_causal(module, options))  # a module without groups
    found: tuple[Tensor, None] = sdpa_attention_forward(given, query, key, value, mask, **options)
    return found


def is_plain(module: torch.nn.Module, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether attention is causal or a causal window, without dropout."""
    whole = mask is not None and mask.ndim
    return not whole and not options.get("dropout") and is_causal(module, options)


def is_causal(module: torch.nn.Module, options: dict[str, Any]) -> bool:
    found = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if found is None else found)


def own_packed_attention(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
    """PACKED_EAGER: `packed_attention` with the model's own eager function."""
    found: tuple[Tensor, None] = packed_attention(*arguments, own=True, **options)
    return found


def own_attention(module: torch.nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The eager attention function in the file that defines the module's class, or a base of it.

    Raises LookupError where there is none.
    """
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            attend: Callable[..., tuple[Tensor, Any]] = found
            return attend
    raise LookupError(f"{type(module).__name__} has no eager_attention_forward")


def mask_of(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    start: int,
    own: bool,
    options: dict[str, Any],
) -> Tensor | None:
    """The mask of the sequence at `start`: boolean [., 1, T, S], or None for all of the past.

    `own`: numbers to add to the scores, as eager functions want them.
    """
    length, reach = query.shape[2], key.shape[2]
    if mask is not None and mask.ndim:
        mask = mask[..., start : start + length, start : start + reach]
    elif mask is not None and length > int(mask):
        mask = band(length, int(mask), query.device)
    else:
        causal = own and is_causal(module, options)
        mask = band(length, length, query.device) if causal else None
    if own and mask is not None and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(
            ~mask, torch.finfo(query.dtype).min
        )
    return mask


def band(length: int, window: int, device: torch.device) -> Tensor:
    """bool [1, 1, T, T]: the last `window` tokens up to each."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at
    return ((distance >= 0) & (distance < window))[None, None]


@torch.compiler.disable
def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """The mask in short: None where it is causal; a window's tokens as a tensor of no dimension.

    A whole boolean mask [B, 1, T, S] where padding or a cache needs one.
    """
    if attention_mask is not None or q_length != kv_length:
        whole: Tensor | None = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            mask_function=mask_function,
            local_size=local_size,
            attention_mask=attention_mask,
            device=device,
            **options,
        )
        return whole
    if (notes := _notes.get()) is not None:
        notes.windows |= set() if local_size is None else {local_size}
        notes.odd_masks |= not is_band(mask_function, local_size, q_length, device)
    return None if local_size is None else torch.tensor(local_size, device="cpu")


def is_band(
    mask_function: Callable[..., Tensor],
    window: int | None,
    length: int,
    device: torch.device | str,
) -> bool:
    """Whether each token sees all before it, or the last `window` of them; asked of the function
    itself, around the window's edges, however long it is."""
    if window is not None:
        length = 2 * window + 2
    edges = range(length) if window is None else (0, window - 1, window, window + 1, 2 * window + 1)
    q = torch.tensor(sorted(set(edges)), device=device)[None, None, :, None]
    kv = torch.arange(length, device=device)[None, None, None]
    zero = torch.zeros_like(q[:, :, :1])
    try:
        found = mask_function(zero, zero, q, kv)
    except Exception:  # it looks into tensors of the forward's length, so it is not plain
        return False
    distance = q - kv
    expected = (distance >= 0) & (distance < (length if window is None else window))
    return bool((found == expected).all())


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
AttentionInterface.register(PACKED_EAGER, own_packed_attention)
AttentionMaskInterface.register(PACKED_EAGER, packed_mask)
AttentionInterface.register(PACKED_ON_META, packed_attention)  # masks would ask for values
