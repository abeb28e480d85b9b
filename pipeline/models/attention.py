"""Attention within the sequences of a packed row: no T × T mask, no padding, no leaks.

transformers separates packed sequences with a T × T mask, so a row costs as much attention as one
sequence of its length. Here each sequence is attended separately, so a row costs the sum of its
sequences. Models whose attention is not plain (a soft cap, sinks, linear attention) keep their own.
A model that leaks between packed sequences either way is refused.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.errors import ConfigError

PACKED = "packed_sequences"  # deliberately without a mask function: transformers makes no masks


@torch.compiler.disable  # torch.compile would compile again for each list of lengths
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query [B, H, T, D] to key, value [B, H_kv, T, D] -> [B, T, H, D].

    With sequence_lengths, T is their sum and no sequence sees another. Without them, each row is
    one sequence.
    """
    lengths = [query.shape[2]] if sequence_lengths is None else sequence_lengths
    parts = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        band = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            at = torch.arange(q.shape[2], device=q.device)
            distance = at[:, None] - at
            band = ((distance >= 0) & (distance < sliding_window))[None, None]
        parts.append(sdpa_attention_forward(module, q, k, v, band, **options)[0])
    return torch.cat(parts, dim=1), None


AttentionInterface.register(PACKED, packed_attention)


def enable_packing(model: PreTrainedModel) -> None:
    """Make `model` keep the sequences of a row apart, given `packing_arguments`.

    Raises ConfigError if neither PACKED nor the model's own attention keeps them apart.
    """
    own = model.config._attn_implementation
    if own == PACKED:
        return
    was_training = model.training
    model.eval()
    if own == "sdpa":
        expected = alone(model)
        model.set_attn_implementation(PACKED)
        if leak(model, expected) < TOLERANCE:
            model.train(was_training)
            return
        model.set_attn_implementation(own)
    error = leak(model, alone(model))
    model.train(was_training)
    if error > TOLERANCE:
        raise ConfigError(
            f"{type(model).__name__}: sequences that share a row see each other (logits differ by "
            f"{error:.1%}), so this architecture cannot be trained on packed sequences"
        )


def packing_arguments(model: PreTrainedModel, lengths: list[int]) -> dict[str, Any]:
    """Arguments of the forward, besides position_ids that restart with each sequence."""
    packed = model.config._attn_implementation == PACKED
    return {"sequence_lengths": lengths} if packed else {}


PROBE = [11, 5, 8]  # lengths of the sequences to compare
TOLERANCE = 0.05  # share of the largest logit: bfloat16 and other kernels stay well below it


def probes(model: PreTrainedModel) -> list[Tensor]:
    vocab_size = model.config.get_text_config().vocab_size
    ids = (torch.arange(sum(PROBE), device=model.device) * 7919 + 1) % vocab_size
    return list(ids.split(PROBE))


@torch.no_grad()
def alone(model: PreTrainedModel) -> Tensor:
    """Logits [T, V] of the probes, each in its own forward."""
    outputs = [model(input_ids=probe[None], use_cache=False) for probe in probes(model)]
    return torch.cat([output.logits[0].float() for output in outputs])


@torch.no_grad()
def leak(model: PreTrainedModel, expected: Tensor) -> float:
    """Largest difference of the packed probes' logits, as a share of the largest expected one."""
    parts = probes(model)
    found = model(
        input_ids=torch.cat(parts)[None],
        position_ids=torch.cat([torch.arange(len(part)) for part in parts])[None].to(model.device),
        use_cache=False,
        **packing_arguments(model, PROBE),
    ).logits[0]
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()
