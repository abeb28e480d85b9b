"""Continuations of a context, which is read once for all of them.

In a packed row, a context is followed by its continuations. Each is at the positions that follow
the context, and sees the context and itself: the row holds a small tree. So a question with four
options costs one reading of the question, not four.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.evaluation.compare import predict
from pipeline.models.attention import (
    PACKED,
    PACKED_EAGER,
    alone,
    difference,
    notes_of,
    tolerance,
    way_of,
)
from pipeline.types import Int64s

UNBOUNDED = 1 << 31
PROBE = ((11, 7, 5, 3, 2), ((), (8, 9), (4, 6, 10)))  # token ids


@dataclass(frozen=True)
class Branched:
    """A context of C tokens and its continuations, which may be empty."""

    context: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Number of tokens, T."""
        return len(self.context) + sum(map(len, self.branches))

    @property
    def input_ids(self) -> Int64s:
        """[T]"""
        return np.array([*self.context, *(id for branch in self.branches for id in branch)])

    @property
    def numbers(self) -> Int64s:
        """[T]: 0 in the context, then the number of the continuation, from 1."""
        lengths = [len(self.context), *map(len, self.branches)]
        return np.repeat(np.arange(len(lengths)), lengths)

    @property
    def position_ids(self) -> Int64s:
        """[T]: those of each continuation follow the context's."""
        after = [len(self.context) + np.arange(len(branch)) for branch in self.branches]
        return np.concatenate([np.arange(len(self.context)), *after])

    @property
    def rows(self) -> list[Int64s]:
        """Of each continuation of b tokens [1 + b]: the last position of the context and its own.

        They predict its tokens, and what follows it.
        """
        return [
            np.append(len(self.context) - 1, np.flatnonzero(self.numbers == number))
            for number in range(1, 1 + len(self.branches))
        ]


def logprobs(model: PreTrainedModel, batch: list[Branched]) -> Iterator[Tensor]:
    """float32 [1 + b, V], nats, at the `rows` of each continuation of each context."""
    lengths = [len(each) for each in batch]
    starts = np.cumsum([0, *lengths[:-1]])
    rows = [start + own for start, each in zip(starts, batch, strict=True) for own in each.rows]
    device = model.device
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate([each.input_ids for each in batch]))[None],
        "position_ids": torch.from_numpy(np.concatenate([each.position_ids for each in batch]))[
            None
        ],
    }
    if any(len(each.branches) > 1 for each in batch):
        inputs["attention_mask"] = mask(np.concatenate([each.numbers for each in batch]))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    logits = predict(model, inputs, lengths, torch.from_numpy(np.concatenate(rows)).to(device))
    for part in logits.split([len(own) for own in rows]):
        yield part.float().log_softmax(-1)


def mask(numbers: Int64s) -> Tensor:
    """bool [1, 1, T, T]: what each token sees, up to the start of its own tree."""
    own = torch.from_numpy(numbers)
    seen = (own == 0) | (own == own[:, None])
    return seen.tril()[None, None]


@torch.no_grad()
def longest_branched(model: PreTrainedModel) -> int:
    """Most tokens of a context with several continuations that the model can read as one; 0 where
    its logits would be others. A tree does not know of sliding windows, so it fits in the shortest.
    """
    way = way_of(model)
    if way.own_rows or way.attention not in (PACKED, PACKED_EAGER):
        return 0
    context, branches = PROBE
    apart = [Branched(context, (branch,)) for branch in branches]
    try:
        found = torch.cat(list(logprobs(model, [Branched(context, branches)])))
    except Exception:  # an architecture may raise whatever it likes
        return 0
    expected = torch.cat(list(logprobs(model, apart)))
    probe = [torch.tensor(context, device=model.device)]
    if not difference(found, expected) <= tolerance(model, probe, alone(model, probe)):
        return 0
    notes = notes_of(model)
    return min(notes.windows if notes else (), default=UNBOUNDED)
