"""The grid of roots: what rounding costs, against fp64, and what never gets lost."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import InvalidRecord, TopK
from storage.codec.codec import STEPS
from storage.codec.grid import same_levels
from storage.codec.root_grid import (
    FAINT,
    FINE,
    MIN_STEP,
    PER_NAT,
    RootGrid,
    dequantise,
    kept,
    largest,
    quantise,
)
from storage.topk import codec_kl
from tests.helpers.records import VOCAB, random_topk, with_samples

STEP = STEPS["v3"]


def one(probabilities: list[float], tail: float) -> TopK:
    """One position with the ids 0, 1, … ."""
    with np.errstate(divide="ignore"):
        return TopK.from_dense(
            np.arange(len(probabilities))[None], np.log([probabilities]), np.log([tail])
        )


@st.composite
def topks(draw: st.DrawFn) -> tuple[TopK, int]:
    vocab_size = draw(st.sampled_from([2, 3, 50, 257, 5000]))
    positions = draw(st.integers(1, 12))
    count = st.integers(0, min(vocab_size, 300))
    counts = draw(st.lists(count, min_size=positions, max_size=positions) | count)
    topk = random_topk(positions, counts, vocab_size, draw(st.integers(0, 99)))
    return (with_samples(topk, 3, vocab_size) if draw(st.booleans()) else topk), vocab_size


@given(topks(), st.sampled_from([MIN_STEP, 1e-3, STEP, 0.01, 0.05]))
@settings(deadline=None, max_examples=200)
def test_the_kl_has_a_bound_and_each_position_sums_to_one(
    made: tuple[TopK, int], step: float
) -> None:
    topk, vocab_size = made
    stays = kept(topk, step)
    found = dequantise(quantise(topk, vocab_size, step))
    np.testing.assert_array_equal(found.counts, stays.counts)
    np.testing.assert_array_equal(found.ids, stays.ids)
    total = found.kept_mass() + np.exp(found.tail_logprob.astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=1e-6)
    # KL <= Σ (p - q)² / q, and √p is off by at most half a step, which is √q at the least but for
    # what a faint entry or the best one of its position is rounded up to.
    outcomes = stays.counts.astype(np.float64) + 1
    assert (codec_kl(stays, found) <= 2.5 * outcomes * step**2 + 1e-5).all()


def test_the_kl_is_what_the_grid_allows() -> None:
    """2 Σ (Δ√p)², which is uniform within half a step, less the part that normalising saves."""
    topk = random_topk(400, 64, 5000)
    found = dequantise(quantise(topk, 5000, 0.001))
    stays = kept(topk, 0.001)
    kl = codec_kl(stays, found)
    expected = 2 * (stays.counts + 1) * 0.001**2 / 12
    assert 0.9 * expected.mean() < kl.mean() < 1.01 * expected.mean()


@given(st.floats(-90, 0), st.sampled_from([1e-3, STEP, 1 / 100]))
@settings(deadline=None)
def test_the_logarithm_of_a_tail_stays_accurate(tail: float, step: float) -> None:
    """Half a level of it, or half a step of √p where that is no more, and what normalising adds."""
    mass = np.exp(np.float64(np.float32(tail)))
    topk = TopK.from_dense([[0]], [[np.log1p(-mass)]] if mass < 1 else [[-90]], [tail])
    found = dequantise(quantise(topk, 2, step))
    shift = 2.5 * step  # of the sum
    assert abs(found.tail_logprob[0] - tail) <= max(0.5 / PER_NAT, 1 / FINE) + shift + 1e-4


def test_no_tail_stays_none_and_a_tiny_one_is_not_lost() -> None:
    topk = TopK(
        np.ones(4, np.uint16), np.zeros(4, np.int32), np.zeros(4, np.float32),
        np.array([-np.inf, -30, -700, -3e38], np.float32),
    )  # fmt: skip
    grid = quantise(topk, 1, STEP)
    found = dequantise(grid)
    assert grid.tails[0] == 0
    assert np.isneginf(found.tail_logprob[0])
    np.testing.assert_allclose(found.tail_logprob[1:3], [-30, -700], atol=0.04)
    assert -5000 < found.tail_logprob[3] < -4000


@given(topks(), st.sampled_from([STEP, 0.01, 0.3, 1.0]))
@settings(deadline=None)
def test_the_best_entry_stays_and_samples_keep_all(made: tuple[TopK, int], step: float) -> None:
    topk, vocab_size = made
    grid = quantise(topk, vocab_size, step)
    filled = topk.counts > 0
    firsts = [np.cumsum(one.counts, dtype=np.int64) - one.counts for one in (topk, grid)]
    np.testing.assert_array_equal(grid.counts > 0, filled)
    np.testing.assert_array_equal(grid.ids[firsts[1][filled]], topk.ids[firsts[0][filled]])
    assert (grid.roots[firsts[1][filled]] >= 1).all()
    if topk.samples is not None:
        np.testing.assert_array_equal(grid.ids, topk.ids)
    else:
        assert (grid.roots >= 1).all()


def test_what_rounds_to_nothing_goes_to_the_tail_exactly() -> None:
    """Also where there was none before: then all of a tiny vocabulary was kept."""
    faint = (0.4 * STEP) ** 2
    grid = quantise(one([1 - 2 * faint, faint, faint], 0), 3, STEP)
    assert grid.counts.tolist() == [1]
    found = dequantise(grid)
    np.testing.assert_allclose(found.tail_logprob, np.log(2 * faint), atol=0.5 / PER_NAT)
    whole = quantise(one([0.5, 0.3, 0.2], 0), 3, STEP)
    assert whole.counts.tolist() == [3]
    assert whole.tails.tolist() == [0]


def test_certain_positions_and_empty_ones() -> None:
    certain = quantise(one([1.0], 0), 2, STEP)
    assert certain.roots.tolist() == [largest(STEP)] == [416]
    assert dequantise(certain).logprobs.tolist() == [0]
    empty = TopK(np.zeros(2, np.uint16), np.zeros(0, np.int32), np.zeros(0, np.float32),
                 np.array([0, -1e-7], np.float32))  # fmt: skip
    for step in (MIN_STEP, STEP, 0.3, 1.0):
        np.testing.assert_allclose(dequantise(quantise(empty, 5, step)).tail_logprob, 0, atol=1e-7)
    faintest = RootGrid(
        STEP, 5, empty.counts, empty.ids, np.zeros(0, np.uint16), np.full(2, -65536, np.int32)
    )
    np.testing.assert_allclose(dequantise(faintest).tail_logprob, 0, atol=1e-7)


def test_faint_entries_beside_samples_have_a_place_of_their_own() -> None:
    p = (0.1 * STEP) ** 2
    topk = with_samples(one([0.9, p, p], 0.1 - 2 * p), 4, 9)
    grid = quantise(topk, 9, STEP)
    assert grid.roots.tolist()[1:] == [0, 0]
    found = dequantise(grid)
    np.testing.assert_allclose(found.logprobs[1:], 2 * np.log(FAINT * STEP), atol=0.01)


def test_many_entries() -> None:
    topk = random_topk(2, [65_535, 65_535], 65_536)
    grid = quantise(topk, 65_536, MIN_STEP)
    found = dequantise(grid)
    assert int(grid.roots.max()) <= largest(MIN_STEP) == 65_535
    np.testing.assert_allclose(
        found.kept_mass() + np.exp(found.tail_logprob.astype(np.float64)), 1, atol=1e-5
    )


@pytest.mark.parametrize("step", [0, -1.0, 1e-5, 1.1, np.nan])
def test_impossible_steps_are_refused(step: float) -> None:
    with pytest.raises(InvalidRecord, match=r"step must be from 1/65535 to 1 \(of the root of p\)"):
        quantise(random_topk(1, 3), VOCAB, step)


def test_grids_are_the_same_whatever_the_order_of_equal_entries() -> None:
    grid = quantise(one([0.4, 0.2, 0.2, 0.1], 0.1), 9, STEP)
    assert grid.same(replace(grid, ids=grid.ids[[0, 2, 1, 3]]))
    assert not grid.same(replace(grid, ids=grid.ids[[1, 0, 2, 3]]))
    assert not grid.same(replace(grid, tails=grid.tails + 1))
    assert not grid.same(replace(grid, roots=grid.roots + np.uint16(1)))
    assert not grid.same(replace(grid, step=0.5))


@given(st.lists(st.integers(0, 6), max_size=5), st.integers(0, 999))
def test_levels_are_compared_as_sets(counts: list[int], seed: int) -> None:
    """Against Python's sets; ids are exchanged within a level, and between neighbours."""
    rng = np.random.default_rng(seed)
    topk = random_topk(len(counts), counts, seed=seed)
    ends = np.cumsum([0, *counts])
    levels = -np.sort(-rng.integers(0, 3, ends[-1]))
    others = topk.ids.copy()
    for _ in range(int(rng.integers(4)) if len(others) else 0):
        at = rng.integers(len(others), size=2)
        others[at] = others[at[::-1]]
    expected = all(
        set(zip(levels[a:b], topk.ids[a:b], strict=True))
        == set(zip(levels[a:b], others[a:b], strict=True))
        for a, b in itertools.pairwise(ends)
    )
    assert same_levels(topk.counts, levels, topk.ids, others) == expected
    roots, tails = levels.astype(np.uint16), np.zeros(len(counts), np.int32)
    grid = RootGrid(STEP, VOCAB, topk.counts, topk.ids, roots, tails)
    assert grid.same(replace(grid, ids=others)) == expected


@pytest.mark.parametrize("wrong", ["negative", "too large", "twice"])
def test_a_grid_with_impossible_ids_is_another_one(wrong: str) -> None:
    grid = quantise(random_topk(4, 5), VOCAB, STEP)
    ids = grid.ids.copy()
    ids[7] = {"negative": -1, "too large": VOCAB, "twice": ids[6]}[wrong]
    roots = replace(grid, roots=np.full_like(grid.roots, 9))  # so that any order is the same
    assert roots.same(replace(roots, ids=grid.ids.copy()))
    assert not roots.same(replace(roots, ids=ids))
    assert not replace(roots, ids=ids).same(roots)
    assert not roots.same(replace(roots, ids=ids[:-1]))
