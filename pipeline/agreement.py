"""When two computations of one model agree: one answer of three, by their mean KL in nats.

Rounding has a floor. It follows from the dtypes of the two computations and the grid of the dump:

- A grid of `step` nats moves each log-probability by up to step / 2, evenly. The KL of that is at
  most log(sinh(step / 2) / (step / 2)), about step² / 24: 1.6e-4 at 1/16. Cut-offs and samples add
  nothing, because what they leave out is in the tail.
- A forward in bfloat16 was up to 1.0e-3 from one in float32 (SmolLM2-135M), mostly under 2e-4.

The answers are the same up to a few floors; computed differently by the two engines above, as with
a sliding window that is one token longer; another model far above.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

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


def bounds(given: float | None, step: float, *dtypes: str) -> Bounds:
    """The user's bound of "the same" where one is given; else from grid and dtypes."""
    if given is not None:
        return Bounds(given, max(FAR, given))
    least = floor(step, *dtypes)
    same = FEW * least
    return Bounds(same, max(FAR, same), SPREAD * least)


def floor(step: float, *dtypes: str) -> float:
    """Mean KL in nats, at most, of rounding alone; a dtype that is not listed counts as bfloat16.

    `dtypes` are those of the two computations; `step` is the grid of the dump in nats.
    """
    half = step / 2
    grid = math.log(math.sinh(half) / half)
    return grid + sum(ROUNDING.get(dtype, ROUNDING["bfloat16"]) for dtype in dtypes)
