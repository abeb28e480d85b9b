"""Pairs of answers against counts by hand, exact p-values, and bounds."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.paired import Pairs, difference, mcnemar, paired, resampled


def pairs(kept: int, lost: int, won: int, missed: int) -> Pairs:
    model = [1] * kept + [0] * lost + [1] * won + [0] * missed
    base = [1] * (kept + lost) + [0] * (won + missed)
    return Pairs(np.array(model, float), np.array(base, float), np.zeros(len(base), np.int64))


def test_known_counts() -> None:
    found = paired(pairs(97, 7, 5, 91))
    assert {name: found[name] for name in ("kept", "lost", "won", "base_right", "right")} == {
        "kept": 97, "lost": 7, "won": 5, "base_right": 104, "right": 102
    }  # fmt: skip
    assert found["kept_share"] == pytest.approx(97 / 104)
    assert found["change"] == pytest.approx(-2 / 200)
    assert found["p"] == pytest.approx(float(Fraction(2 * 1586, 2**12)))  # C(12, 0) + … + C(12, 5)
    low, high = found["kept_interval"]
    # The binomial's own middle 95 % of 104 draws at 97/104.
    assert low == pytest.approx(0.880, abs=0.012)
    assert high == pytest.approx(0.976, abs=0.012)


@pytest.mark.parametrize(("lost", "won"), list(product(range(6), range(6))))
def test_mcnemar_is_the_exact_sign_test(lost: int, won: int) -> None:
    """Against all outcomes one by one: as far from the middle as what was found, or farther."""
    changed = lost + won
    far = abs(lost - won)
    outcomes = [abs(2 * sum(signs) - changed) for signs in product((0, 1), repeat=changed)]
    expected = sum(other >= far for other in outcomes) / len(outcomes)
    assert mcnemar(lost, won) == pytest.approx(expected, abs=1e-15)


def test_mcnemar_of_thousands_is_finite() -> None:
    assert mcnemar(5000, 5000) == 1
    assert 0 < mcnemar(4900, 5100) < 0.05
    assert mcnemar(0, 5000) == 0.0 or mcnemar(0, 5000) < 1e-300


counts = st.integers(0, 30)


@settings(max_examples=20)
@given(counts, counts, counts, st.integers(1, 30))
def test_bounds(kept: int, lost: int, won: int, missed: int) -> None:
    found = paired(pairs(kept, lost, won, missed))
    assert found["kept"] + found["lost"] == found["base_right"]
    assert found["kept"] + found["won"] == found["right"]
    low, high = found["change_interval"]
    assert -1 <= low <= found["change"] + 0.35
    assert found["change"] - 0.35 <= high <= 1
    assert 0 < found["p"] <= 1
    if kept + lost:
        low, high = found["kept_interval"]
        assert 0 <= low <= high <= 1
    else:
        assert found["kept_share"] is found["kept_interval"] is None


def test_a_model_against_itself_changes_nothing() -> None:
    found = paired(pairs(5, 0, 0, 5))
    assert (found["change_interval"], found["kept_interval"], found["p"]) == ([0, 0], [1, 1], 1)


def test_questions_are_resampled_within_their_task() -> None:
    groups = np.array([0] * 3 + [1] * 50)
    draws = resampled(groups, 0)
    assert (draws[:, :3].sum(1) == 3).all()
    assert (draws[:, 3:].sum(1) == 50).all()
    # A task whose questions are all kept adds nothing to the spread.
    one = pairs(0, 25, 0, 25)
    both = Pairs(
        np.concatenate([np.ones(50), one.model]),
        np.concatenate([np.ones(50), one.base]),
        np.repeat([0, 1], 50),
    )
    spread = np.ptp(paired(one)["change_interval"]), np.ptp(paired(both)["change_interval"])
    assert spread[1] == pytest.approx(spread[0] / 2, rel=0.15)


def test_means_over_seeds_are_counted_as_means() -> None:
    base = np.array([1.0, 1, 0, 0])
    seeds = np.array([[1, 0, 1, 0], [1, 1, 0, 0]], float)
    found = paired(Pairs(seeds.mean(0), base, np.zeros(4, np.int64)))
    assert (found["kept"], found["lost"], found["won"]) == (1.5, 0.5, 0.5)
    assert "p" not in found, "a question's seeds are not independent"


def test_difference_of_two_models() -> None:
    one, other = pairs(90, 10, 0, 100), pairs(80, 20, 0, 100)
    found = difference(one, other)
    assert found["kept_share"] == pytest.approx(0.1)
    low, high = found["interval"]
    assert 0.03 < low < 0.1 < high < 0.17
    opposite = difference(other, one)
    assert opposite["interval"] == pytest.approx([-high, -low])
    assert difference(pairs(0, 0, 1, 1), pairs(0, 0, 0, 2))["kept_share"] is None
