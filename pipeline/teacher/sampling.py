"""Ids drawn from a teacher's tail on its own device, without bias (arXiv 2503.16870).

Systematic sampling: one number u in [0, 1) for each position, and the ids that hold the N places
(u + i) / N of the cumulative distribution. An id of probability p is drawn N · p times on average,
and always that rounded down or up, so the variance is below that of N independent draws.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 16  # columns summed before the exact cumulative sum, see `draw`
NONE = -1  # stands for an id where there is no tail to draw from
MASK = (1 << 64) - 1


class Sampling(NamedTuple):
    """How many ids are drawn from each tail, 0 for none, and what decides which."""

    draws: int = 0
    seed: int = 0


NO_SAMPLES = Sampling()


def places(how: Sampling, rest: Tensor, total: Tensor) -> Tensor:
    """float64 [n, draws]: where on the cumulative distribution each position draws.

    u is a hash of the seed and of the bits of two float32 numbers that the position has anyhow: the
    logsumexp [n] of the logits outside the kept ids, and of all. So a retry draws the same, and no
    position need be known; equal positions, as after the same first token, draw the same.
    """
    bits = [value.float().view(torch.int32).long() for value in (rest, total)]
    u = uniform((bits[0] << 32) ^ (bits[1] & 0xFFFFFFFF) ^ mixed_seed(how.seed))
    steps = torch.arange(how.draws, dtype=torch.float64, device=u.device)
    return (u[:, None] + steps) / how.draws


def mixed_seed(seed: int) -> int:
    """A seed spread over 64 bits, signed: neighbours have nothing in common."""
    value = seed * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D & MASK
    return value - (1 << 64) if value >> 63 else value


def uniform(keys: Tensor) -> Tensor:
    """int64 [n] -> float64 [n] in [0, 1): SplitMix64's output function, which changes half of all
    bits when any one of the key changes."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        keys = (keys ^ logical_shift(keys, shift)) * (factor - (1 << 64) * (factor >> 63))
    return logical_shift(keys, 11).double() * 2.0**-53


def logical_shift(values: Tensor, by: int) -> Tensor:
    return (values >> by) & ((1 << (64 - by)) - 1)


def draw(logits: Tensor, at: Tensor, reference: Tensor) -> Tensor:
    """The ids [n, draws] that hold the places `at` (0 to 1) of softmax(logits [n, V]).

    Columns of -inf are never drawn; NONE all along a row that has no other. `reference` [n] is near
    the rows' largest logit. logits are overwritten.

    A float32 cumulative sum over a vocabulary would be off by more than a rare id's probability. So
    columns form groups; the sums of groups, and those within the few groups that are hit, are
    accumulated in float64. Column c belongs to group c % groups.
    """
    rows, size = logits.shape
    groups = -(-size // GROUP)
    whole = size // groups  # members that every group has
    weights = logits.sub_(reference.where(reference > -torch.inf, 0)[:, None]).exp_()
    sums = weights[:, : whole * groups].view(rows, whole, groups).sum(1)
    sums[:, : size - whole * groups] += weights[:, whole * groups :]
    ends = sums.double().cumsum(1)
    group, left = find(ends, at * ends[:, -1:])
    column = group[:, :, None] + groups * torch.arange(-(-size // groups), device=logits.device)
    inside = weights.gather(1, column.clamp(max=size - 1).flatten(1)).view_as(column).double()
    inside = inside.masked_fill(column >= size, 0).cumsum(2)
    member, _ = find(inside, left[:, :, None])
    ids = column.gather(2, member).squeeze(2)
    return ids.masked_fill(~(ends[:, -1:] > 0), NONE)


def find(ends: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """(in which interval each point lies, how far into it), of intervals with these ascending ends
    along the last dimension, from 0.

    A point on a boundary belongs to the interval that begins there, and what rounding has put
    behind the last one to that: so an interval of no length holds none.
    """
    last = ends[..., -1:]
    points = points.minimum(torch.nextafter(last, torch.zeros_like(last)))
    found = torch.searchsorted(ends.contiguous(), points.contiguous(), right=True)
    found = found.clamp(max=ends.shape[-1] - 1)  # of no mass at all, or NaN
    before = torch.where(found > 0, ends.gather(-1, (found - 1).clamp(min=0)), 0)
    return found, points - before
