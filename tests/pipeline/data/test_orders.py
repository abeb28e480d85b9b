"""Shuffled orders, a place at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import orders
from pipeline.data.orders import SHORT, network, permutation, place


def test_a_short_order_is_a_permutation_of_numpy() -> None:
    """The order of runs of every release."""
    expected = np.random.default_rng((3, 0, 1)).permutation(SHORT)
    assert [place(SHORT, at, 3, 0, 1) for at in range(99)] == expected[:99].tolist()
    assert sorted(permutation(10, 1)) == list(range(10))


@pytest.mark.parametrize("size", [SHORT + 1, 100_003, 317**2, 317**2 + 1])
def test_a_long_order_gives_each_item_once(size: int) -> None:
    assert sorted(place(size, at, 7, 1, 2) for at in range(size)) == list(range(size))


@given(st.integers(1, 5000), st.integers(-5, 1 << 70))
def test_the_network_is_a_permutation_of_any_size(size: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "SHORT", 0)
        assert sorted(place(size, at, seed) for at in range(size)) == list(range(size))


def test_the_network_is_as_wide_as_it_must_be() -> None:
    """So a walk is hardly ever longer than one step."""
    for size in (2, 65_537, 50_000_000, 10**9, 2**40 + 1):
        _, height, width = network(size, 1)
        assert size <= height * width < size + width


def test_the_order_is_the_same_for_ever() -> None:
    """A run that resumes with another release must go on where it was."""
    size = 50_000_000
    found = [place(size, at, 1, 0, 0) for at in (0, 1, 2, size - 1)]
    assert found == [47425893, 4897964, 38219583, 21544450]


def test_places_look_random() -> None:
    """Chi-squared over a grid of (part of the order, part of the items), and of neighbours."""
    size, parts, drawn = 10**9, 32, 1 << 16
    for seed in (1, 2):
        every = np.linspace(0, size - 1, drawn).astype(np.int64)
        found = np.array([place(size, int(at), seed, 0, 0) for at in every])
        following = np.array([place(size, at, seed, 0, 0) for at in range(drawn)])
        pairs = [
            (every * parts // size, found * parts // size),
            (following[:-1] * parts // size, following[1:] * parts // size),
            (following[:-1] % parts, following[1:] % parts),
        ]
        for one, other in pairs:
            counts = np.bincount(one * parts + other, minlength=parts**2)
            mean = counts.sum() / parts**2
            chi = ((counts - mean) ** 2 / mean).sum()
            assert abs(chi - parts**2) < 6 * np.sqrt(2 * parts**2), chi


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    size = 10**6
    seeds = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    found = np.array([[place(size, at, *seed) for at in range(500)] for seed in seeds])
    for one in range(len(seeds)):
        for other in range(one):
            assert (found[one] == found[other]).sum() <= 2
