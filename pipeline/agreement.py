"""When two computations of one model agree: one answer of three, by their mean KL in nats.

Rounding has a cost. It follows from the dtypes of the two computations and the grid of the dump:

- A grid of `step` nats moves each log-probability by up to step / 2, evenly. The KL of that is at
  most log(sinh(step / 2) / (step / 2)), about step² / 24: 1.6e-4 at 1/16. A grid of the roots of
  probabilities moves each by up to step / 2. The KL is 2 Σ (Δ√p)² to second order, so step² / 6 for
  each entry and for the tail: 6.8e-4 at 1/125 with 64 entries. Cut-offs and samples add nothing,
  because what they leave out is in the tail. The writer of a dump measures the KL of its grid, and
  that of some rows is near the mean of all.
- A forward in bfloat16 was up to 1.0e-3 from one in float32 (SmolLM2-135M), mostly under 2e-4.

The answers are the same up to a few roundings of a forward and one of the grid; computed
differently by the two engines above, as with a sliding window that is one token longer; another
model far above.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from pipeline.types import Json
from storage import LogitDataset
from storage.committed import Totals

ROUNDING = {"float32": 5e-6, "float16": 2e-5, "bfloat16": 6e-4}
"""Nats of mean KL that computing in this dtype adds."""
FEW = 3
"""Roundings of forwards up to which two computations are the same."""
SLACK = 1.5
"""Some rows' KL of the grid, at most, over that of the whole dump."""
FAR = 0.5
"""Nats. Weights of 4 bits and another rope theta stay below; other weights, and rows that are one
position off, do not."""
SURE = 4
"""Standard errors that chance does not reach."""
SPREAD = 2
"""Standard deviation of the KL at one position, over its mean where only rounding differs."""


class Answer(StrEnum):
    """What a mean KL says of two computations."""

    SAME = "the same"
    DIFFERENT = "computed differently by the two engines"
    OTHER = "another model"


@dataclass(frozen=True)
class Bounds:
    """Largest mean KL in nats of each answer: `same`, and `far` before it is another model.

    `spread` is the standard deviation of one position's KL where only rounding differs.
    """

    same: float
    far: float = FAR
    spread: float = 0.0

    def answer(self, mean: float, noise: float = 0.0, positions: int = 1) -> Answer:
        """The answer for the mean over `positions`, whose draws have the standard error `noise`."""
        if abs(mean) <= self.limit(noise, positions):  # False for NaN
            return Answer.SAME
        return Answer.DIFFERENT if abs(mean) <= self.far + SURE * noise else Answer.OTHER

    def limit(self, noise: float = 0.0, positions: int = 1) -> float:
        """Largest mean that is the same: `same`, and what chance adds."""
        return self.same + SURE * math.hypot(noise, self.spread / math.sqrt(positions))


def bounds(given: float | None, grid: float, *dtypes: str) -> Bounds:
    """The user's bound of "the same" where one is given; else from grid and dtypes.

    `dtypes` are those of the two computations; one that is not listed counts as bfloat16. `grid` is
    the mean KL in nats of the dump's grid.
    """
    if given is not None:
        return Bounds(given, max(FAR, given))
    rounding = sum(ROUNDING.get(dtype, ROUNDING["bfloat16"]) for dtype in dtypes)
    same = FEW * rounding + SLACK * grid
    return Bounds(same, max(FAR, same), SPREAD * (rounding + grid))


def grid_of(dump: LogitDataset) -> float:
    """Mean KL in nats of a dump's grid: as its writer measured it, or the most that it can be."""
    measured = Totals.of(shard.marker for shard in dump.shards).codec_kl
    most = grid_cost(dump.plan)
    return most if measured is None else min(max(measured, 0.0), most)


def grid_cost(plan: Json) -> float:
    """Mean KL in nats, at most, of the grid of a dump with this plan."""
    step = float(plan["step"])
    if plan.get("codec") == "v3":
        return (int(plan["k"]) + 1) * step**2 / 6
    half = step / 2
    return math.log(math.sinh(half) / half)
