"""TopK: cutting entries and spreading the tail keep the mass."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import InvalidRecord, Record, TopK, decode, encode
from storage.topk import check_topk, least_logprob, position_sums
from tests.helpers.records import VOCAB, random_record, random_topk, sampled_topks, with_samples


@given(st.floats(0, 1, exclude_max=True))
def test_the_least_logprob_of_a_probability(p: float) -> None:
    """Comparing with it is comparing the probability itself in float64."""
    least = least_logprob(p)
    assert least.dtype == np.float32
    below = np.nextafter(least, np.float32(-np.inf)).astype(np.float64)
    assert np.exp(np.float64(least)) >= p
    assert p == 0 or np.exp(below) < p


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.sampled_from([0, 1e-9, 1e-3, 0.02, 0.9]),
    st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    st.integers(0, 99),
)
def test_against_a_plain_loop(counts: list[int], min_prob: float, top_p: float, seed: int) -> None:
    topk = random_topk(len(counts), counts, seed=seed)
    cut = topk.cut(min_prob, top_p)
    at = kept_at = 0
    for t, count in enumerate(topk.counts):
        p = np.exp(topk.logprobs[at : at + count].astype(np.float64))
        held, size = 0.0, 0
        for probability in p:
            if size and (probability < min_prob or (held >= top_p and top_p < 1)):
                break
            held, size = held + probability, size + 1
        assert cut.counts[t] == size
        same = slice(kept_at, kept_at + size)
        np.testing.assert_array_equal(cut.ids[same], topk.ids[at : at + size])
        np.testing.assert_array_equal(cut.logprobs[same], topk.logprobs[at : at + size])
        tail = np.exp(topk.tail_logprob[t].astype(np.float64)) + p[size:].sum()
        assert np.exp(cut.tail_logprob[t].astype(np.float64)) == pytest.approx(tail, rel=1e-5)
        at, kept_at = at + count, kept_at + size


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 99))
def test_sums_over_positions_are_exact_also_of_empty_ones(counts: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=sum(counts))
    ends = np.cumsum([0, *counts])
    expected = [math.fsum(values[a:b]) for a, b in itertools.pairwise(ends)]
    found = position_sums(values, np.array(counts, np.uint16))
    np.testing.assert_allclose(found, expected, atol=1e-14)
    assert all(found[t] == 0 for t, count in enumerate(counts) if not count)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
def test_only_a_rise_within_a_position_is_refused(counts: list[int], seed: int) -> None:
    topk = random_topk(len(counts), counts, seed=seed)
    check_topk(topk, VOCAB)
    begins = np.cumsum([0, *counts])
    for at in sorted(set(range(1, begins[-1])) - set(begins)):
        higher = topk.logprobs.copy()
        higher[at] = np.nextafter(higher[at - 1], np.float32(1))
        position = int(np.searchsorted(begins, at, "right")) - 1
        with pytest.raises(InvalidRecord, match=f"position {position}: entries are not in order"):
            check_topk(replace(topk, logprobs=higher), VOCAB)


def test_nothing_is_cut_without_a_cut_off() -> None:
    topk = random_topk(5, [3, 0, 20, 1, 300])
    cut = topk.cut()
    for name in ("counts", "ids", "logprobs", "tail_logprob"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(topk, name))


def test_a_cut_record_is_stored_as_any_other() -> None:
    cut = random_topk(30, 40).cut(min_prob=0.01)
    assert 1 <= cut.counts.min() < cut.counts.max() < 40
    found = decode(encode(cut, vocab_size=VOCAB))
    np.testing.assert_allclose(found.tail_logprob, cut.tail_logprob, atol=0.07)
    total = found.kept_mass() + np.exp(found.tail_logprob.astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize(("min_prob", "top_p"), [(-0.1, 1), (1, 1), (0, 0), (0, 1.1)])
def test_what_is_no_probability_is_refused(min_prob: float, top_p: float) -> None:
    with pytest.raises(ValueError, match="min_prob in"):
        random_topk(2, 3).cut(min_prob, top_p)


@given(sampled_topks())
@settings(deadline=None)
def test_spreading_the_tail_moves_all_of_its_mass(made: tuple[TopK, int]) -> None:
    topk, _ = made
    spread, samples = topk.spread_tail(), topk.samples
    assert samples is not None
    assert np.isneginf(spread.tail_logprob).all()
    np.testing.assert_allclose(spread.kept_mass(), 1, atol=1e-5)
    ends = np.cumsum(spread.counts, dtype=np.int64)
    for at, (end, count) in enumerate(zip(ends, spread.counts, strict=True)):
        here = slice(end - count, end)
        kept, drawn = int(topk.counts[at]), int(samples.counts[at])
        before = int(topk.counts[:at].sum(dtype=np.int64)), int(samples.counts[:at].sum())
        expected = [*topk.ids[before[0] :][:kept], *samples.ids[before[1] :][:drawn]]
        assert spread.ids[here].tolist() == expected
        shares = samples.times[before[1] :][:drawn] / samples.draws
        tail = np.exp(float(topk.tail_logprob[at]))
        np.testing.assert_allclose(np.exp(spread.logprobs[here][kept:]), tail * shares, rtol=1e-4)


def test_spread_without_samples_is_itself_and_cutting_with_them_is_refused() -> None:
    topk = random_topk(4, 3)
    assert topk.spread_tail() is topk
    with pytest.raises(ValueError, match="cut before drawing"):
        with_samples(topk, 4).cut(min_prob=0.1)


def test_a_record_of_samples_alone_has_no_entries() -> None:
    record = random_record(1, k=0, samples=12)
    assert isinstance(record, Record)
    assert len(record.topk.ids) == 0
    assert record.topk.dense()[0].shape == (19, 0)


@given(st.integers(0, 99), st.integers(1, VOCAB + 3), st.booleans())
def test_folding_moves_the_mass_of_ids_beyond_a_width(seed: int, width: int, all_: bool) -> None:
    """Against plain sums in float64; positions that then hold every id are scaled instead."""
    counts = VOCAB if all_ else [0, 1, 2, 7, 30]
    topk = random_topk(5, counts, seed=seed)
    folded = topk.fold(width)
    np.testing.assert_array_equal(folded.ids, topk.ids[topk.ids < width])
    ends, there = np.cumsum(topk.counts), np.cumsum(folded.counts)
    p, q = np.exp(topk.logprobs.astype(float)), np.exp(folded.logprobs.astype(float))
    for at in range(5):
        own = slice(ends[at] - topk.counts[at], ends[at])
        new = slice(there[at] - folded.counts[at], there[at])
        kept = topk.ids[own] < width
        tail = np.exp(float(topk.tail_logprob[at])) + p[own][~kept].sum()
        if kept.sum() == width and not kept.all():
            np.testing.assert_allclose(q[new], p[own][kept] / p[own][kept].sum(), rtol=1e-5)
            assert np.isneginf(folded.tail_logprob[at])
        else:
            np.testing.assert_array_equal(q[new], p[own][kept])
            np.testing.assert_allclose(np.exp(float(folded.tail_logprob[at])), tail, rtol=1e-5)


def test_a_record_with_samples_is_spread_before_it_is_folded() -> None:
    topk = with_samples(random_topk(4, 3), 6)
    with pytest.raises(ValueError, match="spread_tail"):
        topk.fold(10)
    folded = topk.spread_tail().fold(10)
    mass = folded.kept_mass() + np.exp(folded.tail_logprob.astype(float))
    np.testing.assert_allclose(mass, 1, atol=1e-5)
