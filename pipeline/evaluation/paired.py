"""Which of the base's right answers a model keeps, question by question, and how sure that is.

Both answered the same questions, so they are compared in pairs: a question is kept (both right),
lost (only the base), won (only the model) or missed (neither).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.measures import RESAMPLES, Float64s
from pipeline.types import Json

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class Pairs(NamedTuple):
    """The same N questions, answered by a model and by its base."""

    model: Float64s
    """[N]: 1 where the answer is right, or the share of a model's seeds with a right answer."""
    base: Float64s
    """[N]: 1 or 0."""
    groups: Ints
    """[N]: number of each question's task. Questions are resampled within their task."""


def paired(pairs: Pairs, seed: int = 0) -> Json:
    """Counts, shares with their 95 % bootstrap intervals over questions, and McNemar's p-value.

    kept_share is of the questions that the base answers, None where it answers none; change is of
    all questions. Where `model` has means over seeds, so do the counts, and there is no p-value.
    """
    model, base = pairs.model, pairs.base
    kept, lost, won = (
        float(part.sum()) for part in (model * base, (1 - model) * base, model * (1 - base))
    )
    draws = resampled(pairs.groups, seed)
    with np.errstate(invalid="ignore"):
        kept_share = (draws @ (model * base)) / (draws @ base)
    found: dict[str, Any] = {
        "questions": len(base),
        "base_right": int(base.sum()),
        "right": number(float(model.sum())),
        "kept": number(kept),
        "lost": number(lost),
        "won": number(won),
        "kept_share": kept / (kept + lost) if kept + lost else None,
        "kept_interval": interval(kept_share) if kept + lost else None,
        "change": (won - lost) / len(base),
        "change_interval": interval(draws @ (model - base) / len(base)),
    }
    if set(np.unique(model)) <= {0.0, 1.0}:
        found["p"] = mcnemar(int(lost), int(won))
    return found


def difference(one: Pairs, other: Pairs, seed: int = 0) -> Json:
    """How many more of the base's right answers one model keeps than another, as shares of them.

    Both are paired with the same base on the same questions; None where it answers none.
    """
    draws, base = resampled(one.groups, seed), one.base
    if not base.any():
        return {"kept_share": None, "interval": None}
    gap = (one.model - other.model) * base
    with np.errstate(invalid="ignore"):
        return {
            "kept_share": float(gap.sum() / base.sum()),
            "interval": interval((draws @ gap) / (draws @ base)),
        }


def resampled(groups: Ints, seed: int) -> Ints:
    """int64 [RESAMPLES, N]: how often each question is drawn, with replacement in each group."""
    draws = np.zeros((RESAMPLES, len(groups)), np.int64)
    random = np.random.default_rng(seed)
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        share = np.full(len(own), 1 / len(own))
        draws[:, own] = random.multinomial(len(own), share, size=RESAMPLES)
    return draws


def interval(values: Float64s) -> list[float]:
    """The middle 95 %; resamples without a question that the base answers are left out."""
    found = values[np.isfinite(values)]
    return [float(value) for value in np.percentile(found, [2.5, 97.5])]


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value that losses and wins are equally likely.

    Source: McNemar 1947, with the binomial distribution in place of chi-squared.
    """
    changed = lost + won
    ways = tail = 1  # of binomial(changed, count), and their sum
    for count in range(min(lost, won)):
        ways = ways * (changed - count) // (count + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
