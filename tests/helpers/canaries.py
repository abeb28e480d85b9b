"""Tensors with something around them that nobody may read or write."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

AROUND = 37
"""Elements before and behind, an odd number: no row begins at a round address."""


class Guarded:
    """A copy of a tensor with canaries before it, behind it and between its rows.

    A canary is NaN, or an id of no vocabulary. `gap` of them are between two rows, and `ahead` more
    than AROUND before the first.
    """

    def __init__(self, given: Tensor, ahead: int = 0, gap: int = 0) -> None:
        rows, width = given.shape if given.ndim == 2 else (1, len(given))
        first, stride = AROUND + ahead, width + gap
        size = first + rows * stride + AROUND
        canary = torch.nan if given.is_floating_point() else 1 << 40
        self.memory = torch.full((size,), canary, dtype=given.dtype)
        self.own = torch.zeros(size, dtype=torch.bool)
        place = (given.shape, (stride, 1)[2 - given.ndim :], first)
        self.values = self.memory.as_strided(*place)
        self.values.copy_(given)
        self.own.as_strided(*place).fill_(True)
        self.before = self.memory.clone()

    def whole(self) -> bool:
        """Whether all canaries are as they were."""
        return same_bits(self.memory[~self.own], self.before[~self.own])

    def unchanged(self) -> bool:
        return same_bits(self.memory, self.before)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@contextmanager
def guarding() -> Iterator[list[Guarded]]:
    """What `torch.empty` and `torch.empty_like` make within it has canaries around."""
    made: list[Guarded] = []

    def empty(*shape: int, dtype: Any, **_: Any) -> Tensor:
        made.append(Guarded(torch.zeros(shape, dtype=dtype)))
        return made[-1].values

    def empty_like(other: Tensor) -> Tensor:
        return empty(*other.shape, dtype=other.dtype)

    with patch("torch.empty", empty), patch("torch.empty_like", empty_like):
        yield made
