"""Where in a sequence two computations part."""

import numpy as np
import pytest

from pipeline.onset import describe, lengths, part

BOUND = 5e-4
POSITIONS = np.tile(np.arange(100), 6)


def noisy(means: np.ndarray) -> np.ndarray:
    """KL at POSITIONS whose means over the rows are near `means` [100]."""
    noise = np.random.default_rng(0).lognormal(0, 1, len(POSITIONS))
    return np.tile(means, 6) * noise / np.exp(0.5)


def test_a_step_is_found_and_the_setting_named() -> None:
    means = np.where(np.arange(100) < 64, 1.2e-4, 2e-2)
    assert part(noisy(means), POSITIONS, BOUND) == ("step", 64)
    config = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    told = describe(noisy(means), POSITIONS, BOUND, {"text_config": {}, **config})
    assert "begins at position 64" in told
    assert "sliding_window is 64 (layers 0)" in told
    told = describe(noisy(means), POSITIONS, BOUND, {"sliding_window": 20})
    assert "sliding_window" not in told


def test_growth_with_the_position_is_not_a_step() -> None:
    means = 1e-4 + 2e-4 * np.arange(100) ** 1.5
    shape, at = part(noisy(means), POSITIONS, BOUND)
    assert (shape, at < 10) == ("growing", True)
    assert "rope" in describe(noisy(means), POSITIONS, BOUND, {})


def test_from_the_first_token_on_it_is_not_the_attention() -> None:
    assert part(noisy(np.full(100, 1e-2)), POSITIONS, BOUND) == ("everywhere", 0)
    assert "quantisation" in describe(noisy(np.full(100, 1e-2)), POSITIONS, BOUND, {})


def test_from_the_second_token_on_it_is_the_attention() -> None:
    means = np.where(np.arange(100) < 1, 1e-4, 1e-2)
    assert part(noisy(means), POSITIONS, BOUND) == ("step", 1)
    assert "soft cap" in describe(noisy(means), POSITIONS, BOUND, {})


def test_rows_with_masks_say_what_they_can() -> None:
    """Known at every ninth position: a step lies behind the one before, and nothing tells whether a
    difference at the first of them begins there."""
    known = POSITIONS % 9 == 5
    step = np.where(np.arange(100) < 64, 1.2e-4, 2e-2)
    told = describe(noisy(step)[known], POSITIONS[known], BOUND, {"sliding_window": 64})
    assert "begins at position 68" in told
    assert "sliding_window is 64" in told
    told = describe(noisy(step)[known], POSITIONS[known], BOUND, {"sliding_window": 57})
    assert "sliding_window" not in told
    told = describe(noisy(np.full(100, 1e-2))[known], POSITIONS[known], BOUND, {})
    assert "It is there at position 5" in told
    assert "nothing tells where it begins" in told


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_broken_values_are_described_too(value: float) -> None:
    kl = noisy(np.full(100, 1e-4))
    kl[50::100] = value
    assert part(kl, POSITIONS, BOUND)[0] in ("step", "growing")
    assert part(np.full(2, value), np.arange(2), BOUND)[0] == "everywhere"


def test_only_settings_that_count_tokens_are_suspected() -> None:
    config = {"sliding_window": 64, "use_sliding_window": True, "chunk_size_feed_forward": 0}
    assert lengths({"text_config": config}) == [("sliding_window", 64)]
