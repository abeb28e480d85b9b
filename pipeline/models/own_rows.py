"""Packed sequences with a row of their own, for models that cannot keep them apart in one.

The decoder turns a packed row into a batch of its sequences, padded to the longest, runs once, and
puts the states of the real tokens back into one row. A causal model's tokens see nothing after
them, so the padding needs no mask. One packed row stays one forward, so ranks stay in step.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.devices import to_device
from pipeline.models.decoder import decoder_of

POSITIONAL = {"position_ids", "attention_mask", "cache_position"}
"""Arguments that describe the packed row. Without them a model numbers each row from 0."""


class OwnRows:
    """Wraps the forwards of a model and its decoder; both take `sequence_lengths`.

    Outputs have the packed row's shape, [1, T, .]. Without `sequence_lengths` nothing changes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.wrapped: list[nn.Module] = [decoder_of(model), model]
        self.decode, self.predict = (module.forward for module in self.wrapped)
        self.names = list(inspect.signature(self.decode).parameters)
        self.lengths: list[int] | None = None  # of the row that is in the model
        self.wrapped[0].forward = like(self.decode, self.decoder_forward)
        model.forward = like(self.predict, self.model_forward)

    def remove(self) -> None:
        for module in self.wrapped:
            del module.forward

    @torch.compiler.disable(recursive=False)  # or it compiles again for each list of lengths
    def model_forward(
        self, *arguments: Any, sequence_lengths: list[int] | None = None, **options: Any
    ) -> Any:
        """Keeps the lengths for the decoder, to which not every model passes its options."""
        self.lengths = sequence_lengths
        try:
            return self.predict(*arguments, **options)
        finally:
            self.lengths = None

    @torch.compiler.disable(recursive=False)
    def decoder_forward(
        self, *arguments: Any, sequence_lengths: list[int] | None = None, **options: Any
    ) -> Any:
        lengths = sequence_lengths or self.lengths
        options |= dict(zip(self.names, arguments, strict=False))
        if lengths is None:
            return self.decode(**options)
        for name in POSITIONAL:
            options.pop(name, None)
        padded, real = places(lengths)
        for name, value in options.items():
            if isinstance(value, Tensor) and value.shape[:2] == (1, len(real)):
                options[name] = value[0][to_device(padded, value.device)]
        output = self.decode(**options)
        hidden = output[0]
        row = hidden.flatten(0, 1).index_select(0, to_device(real, hidden.device))[None]
        if isinstance(output, tuple):
            return (row, *output[1:])
        output.last_hidden_state = row
        return output


def like(forward: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """`instead`, with the signature of `forward`, at which transformers looks."""

    @functools.wraps(forward)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        return instead(*arguments, **options)

    return wrapped


def places(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(int64 [B, longest]: the token of the packed row at each place of the batch, a sequence's
    last one where it is padded; int64 [T]: the place in the flat batch of each token)."""
    sizes, longest = torch.tensor(lengths)[:, None], max(lengths)
    starts = sizes.cumsum(0) - sizes
    at = torch.arange(longest)
    padded = starts + at.minimum(sizes - 1)
    return padded, (at < sizes).flatten().nonzero()[:, 0]


def padded_tokens(lengths: Sequence[int]) -> int:
    """Tokens that go through the decoder for a packed row of sequences of these lengths."""
    return len(lengths) * max(lengths, default=0)


def padding(rows: Sequence[Sequence[int]]) -> float:
    """Share of padding in the decoder for packed rows, each given as its sequences' lengths."""
    through = sum(map(padded_tokens, rows))
    return 1 - sum(map(sum, rows)) / through if through else 0.0


def cost(model: PreTrainedModel, share: float) -> str:
    """What rows of their own cost, as a sentence."""
    return (
        f"{type(model).__name__} cannot keep packed sequences apart, so each sequence has a row of "
        f"its own: {share:.0%} of the tokens in the decoder are padding"
    )
