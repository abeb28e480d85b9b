"""One answer of three, from the mean KL of two computations."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import agreement
from pipeline.agreement import FAR, SURE, Answer, Bounds, bounds, grid_cost, grid_of
from storage import LogitDataset, TopK
from storage.codec.codec import kept, quantised, restored
from storage.committed import Totals
from storage.topk import codec_kl


@pytest.mark.parametrize(
    ("step", "dtypes", "mean", "answer"),
    [
        (1 / 16, ("float32", "float32"), 1.2e-4, Answer.SAME),
        (1 / 16, ("float32", "float32"), 1.4e-3, Answer.DIFFERENT),  # a soft cap that is ignored
        (1 / 16, ("float32", "bfloat16"), 1.1e-3, Answer.SAME),
        (1 / 16, ("bfloat16", "bfloat16"), 1.2e-3, Answer.SAME),
        (1 / 16, ("bfloat16", "bfloat16"), 6e-3, Answer.DIFFERENT),  # a window off by one
        (1 / 16, ("bfloat16", "bfloat16"), 1.7e-2, Answer.DIFFERENT),
        (1 / 4, ("float32", "float32"), 2.2e-3, Answer.SAME),
        (1 / 16, ("float32", "float32"), -1e-2, Answer.DIFFERENT),
        (1 / 16, ("float32", "float32"), 1.3, Answer.OTHER),
        (1 / 16, ("bfloat16", "bfloat16"), math.nan, Answer.OTHER),
        (1 / 16, ("bfloat16", "bfloat16"), math.inf, Answer.OTHER),
    ],
)
def test_measured_differences(
    step: float, dtypes: tuple[str, ...], mean: float, answer: Answer
) -> None:
    """Measured: the floors, and differences of real families."""
    assert bounds(None, grid_cost({"step": step}), *dtypes).answer(mean, positions=1000) is answer


GRIDS = [*(("v1", step) for step in (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)),
         *(("v3", step) for step in (1 / 2048, 1 / 416, 1 / 100, 0.05))]  # fmt: skip


@given(st.sampled_from(GRIDS), st.integers(0, 1000))
def test_the_grid_costs_no_more_than_is_said(grid: tuple[str, float], seed: int) -> None:
    codec, step = grid
    logits = np.random.default_rng(seed).normal(0, 2, (200, 50))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logprobs, 1)[:, :20]
    found = np.take_along_axis(logprobs, ids, 1)
    tail = np.log1p(-np.exp(found).sum(1))
    exact = TopK.from_dense(ids, found, tail)
    stored = restored(quantised(exact, 50, step, codec))
    cost = codec_kl(kept(exact, step, codec), stored).mean()
    limit = grid_cost({"step": step, "codec": codec, "k": 20})
    assert 0 < cost < 1.1 * limit


def test_a_bound_that_is_given_is_that_of_the_same() -> None:
    limits = bounds(0.02, 1e-4, "float32", "float32")
    assert limits.limit(positions=1) == 0.02
    assert [limits.answer(mean) for mean in (0.02, 0.021, 0.51)] == list(Answer)
    assert bounds(2.0, 1e-4).answer(1.9) is Answer.SAME


def test_noise_and_few_positions_widen_the_bound() -> None:
    assert Bounds(0.1).limit(0.01) == pytest.approx(0.1 + SURE * 0.01)
    assert Bounds(0.1).answer(FAR + 0.03, noise=0.01) is Answer.DIFFERENT
    limits = bounds(None, grid_cost({"step": 1 / 16}), "bfloat16", "bfloat16")
    assert limits.limit(positions=1) > 2 * limits.limit(positions=100)
    assert limits.limit(positions=10**6) == pytest.approx(limits.same, rel=0.01)


def test_a_dump_says_what_its_grid_cost_within_what_it_can(
    dump_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = LogitDataset(dump_path)
    measured = Totals.of(shard.marker for shard in dump.shards).codec_kl
    assert measured is not None
    assert 0 < measured < grid_cost(dump.plan)
    assert grid_of(dump) == measured
    monkeypatch.setattr(agreement, "grid_cost", lambda plan: measured / 2)
    assert grid_of(dump) == measured / 2  # a marker may come from anyone
