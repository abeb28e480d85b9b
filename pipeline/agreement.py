"""When two computations of one model agree: one answer of three, by their mean KL in nats.

Rounding has a floor. It follows from the dtypes of the two computations and the grid of the dump:

- A grid of `step` nats moves each log-probability by up to step / 2, evenly. The KL of that is at
  most log(sinh(step / 2) / (step / 2)), about step² / 24: 1.6e-4 at 1/16. A grid of the roots of
  probabilities moves each by up to step / 2. The KL is 2 Σ (Δ√p)² to second order, so step² / 6 for
  each entry and for the tail: 6.3e-5 at 1/416 with 64 entries. Cut-offs and samples add nothing,
  because what they leave out is in the tail.
- A forward in bfloat16 was up to 1.0e-3 from one in float32 (SmolLM2-135M), mostly under 2e-4.

The answers are the same up to a few floors; computed differently by the two engines above, as with
a sliding window that is one token longer; another model far above.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from pipeline.types import Json

ROUNDING = {"float32": 5e-6, "float16": 2e-5, "bfloat16": 6e-4}
"""Nats of mean KL that computing in this dtype adds."""
FEW = 3
"""Floors up to which two computations are the same."""
FAR = 0.5
"""Nats. Weights of 4 bits and another rope theta stay below; other weights, and rows that are one
position off, do not."""
SURE = 4
"""Standard errors that chance does not reach."""
SPREAD = 2
"""Standard deviation of the KL at one position, in floors."""


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
    """The user's bound of "the same" where one is given; else from grid and dtypes, see floor."""
    if given is not None:
        return Bounds(given, max(FAR, given))
    least = floor(grid, *dtypes)
    same = FEW * least
    return Bounds(same, max(FAR, same), SPREAD * least)


def floor(grid: float, *dtypes: str) -> float:
    """Mean KL in nats, at most, of rounding alone; a dtype that is not listed counts as bfloat16.

    `dtypes` are those of the two computations; `grid` is the KL of the dump's grid, see grid_cost.
    """
    return grid + sum(ROUNDING.get(dtype, ROUNDING["bfloat16"]) for dtype in dtypes)


def grid_cost(plan: Json) -> float:
    """Mean KL in nats, at most, of the grid of a dump with this plan."""
    step = float(plan["step"])
    if plan.get("codec") == "v3":
        return (int(plan["k"]) + 1) * step**2 / 6
    half = step / 2
    return math.log(math.sinh(half) / half)
