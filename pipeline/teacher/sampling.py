"""Draw ids from a teacher's tail on its own device, without bias (arXiv 2503.16870).

Systematic sampling: draw one number u in [0, 1) per position and take the ids at the N points
(u + i) / N of the cumulative distribution. An id of probability p is drawn N · p times on average,
and always N · p rounded down or up, so the variance is below that of N independent draws.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 16  # columns summed before the exact cumulative sum, see `draw`
NONE = -1  # in place of an id if there is no tail to draw from
MASK = (1 << 64) - 1


class Sampling(NamedTuple):
    """Number of ids to draw from each tail (0: none), and the seed."""

    draws: int = 0
    seed: int = 0


NO_SAMPLES = Sampling()


def places(how: Sampling, rest: Tensor, total: Tensor) -> Tensor:
    """float64 [n, draws]: the points of the cumulative distribution at which each position draws.

    u is a hash of the seed and of the bits of two float32 numbers of the position: `rest` [n], the
    logsumexp of the logits outside the kept ids, and `total` [n], that of all logits. So a retry
    draws the same ids, and no position index is needed. Equal positions, such as those after the
    same first token, draw the same ids.
    """
    bits = [value.float().view(torch.int32).long() for value in (rest, total)]
    u = uniform((bits[0] << 32) ^ (bits[1] & 0xFFFFFFFF) ^ mixed_seed(how.seed))
    steps = torch.arange(how.draws, dtype=torch.float64, device=u.device)
    return (u[:, None] + steps) / how.draws


def mixed_seed(seed: int) -> int:
    """Spread a seed over 64 bits, signed, so that neighbouring seeds have nothing in common."""
    value = seed * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D & MASK
    return value - (1 << 64) if value >> 63 else value


def uniform(keys: Tensor) -> Tensor:
    """int64 keys [n] -> float64 [n] in [0, 1), by the output function of SplitMix64.

    One changed bit of a key changes half of all output bits on average.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        keys = (keys ^ logical_shift(keys, shift)) * (factor - (1 << 64) * (factor >> 63))
    return logical_shift(keys, 11).double() * 2.0**-53


def logical_shift(values: Tensor, by: int) -> Tensor:
    return (values >> by) & ((1 << (64 - by)) - 1)


def draw(logits: Tensor, at: Tensor, reference: Tensor) -> Tensor:
    """Ids [n, draws] at the points `at` (0 to 1) of the cumulative softmax(logits [n, V]).

    Columns of -inf are never drawn; a row of only -inf gives NONE. `reference` [n] is near each
    row's largest logit. The logits are overwritten.

    The error of a float32 cumulative sum over a vocabulary is larger than a rare id's probability.
    So the columns form groups, and float64 accumulates the groups' sums and the columns within the
    few groups that are hit. Column c belongs to group c % groups.
    """
    rows, size = logits.shape
    groups = -(-size // GROUP)
    whole = size // groups  # members that every group has at least
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
    """(index of each point's interval, distance of the point from the interval's start).

    The intervals start at 0 and have these ascending `ends` along the last dimension. A point on a
    boundary belongs to the interval that starts there; a point that rounding put past the last end
    belongs to the last interval with a length. So an empty interval holds no point.
    """
    last = ends[..., -1:]
    points = points.minimum(torch.nextafter(last, torch.zeros_like(last)))
    found = torch.searchsorted(ends.contiguous(), points.contiguous(), right=True)
    found = found.clamp(max=ends.shape[-1] - 1)  # for no mass at all, or NaN
    before = torch.where(found > 0, ends.gather(-1, (found - 1).clamp(min=0)), 0)
    return found, points - before
