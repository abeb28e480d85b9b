"""Draws from the tail: their frequencies, their places, and the gradient that they make."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.losses import sparse_divergence
from pipeline.teacher.sampling import NONE, Sampling, draw, places, uniform
from storage import TopK


def tails(rows: int, size: int, seed: int = 0) -> Tensor:
    """Logits [rows, size]; a third is -inf, as kept ids are, and so is the whole first row."""
    torch.manual_seed(seed)
    logits = torch.randn(rows, size) * 3
    logits[torch.rand(rows, size) < 1 / 3] = -torch.inf
    logits[0] = -torch.inf
    return logits


def counts_of(ids: Tensor, size: int) -> Tensor:
    """[rows, size] how often each id was drawn."""
    found = torch.zeros(len(ids), size + 1, dtype=torch.float64)
    return found.scatter_add(1, ids.long() + 1, torch.ones(ids.shape, dtype=torch.float64))[:, 1:]


@pytest.mark.parametrize("size", [1, 2, 16, 17, 41, 1000, 33_000])
@pytest.mark.parametrize("draws", [1, 3, 50])
def test_each_id_is_drawn_as_often_as_its_probability_says(size: int, draws: int) -> None:
    """N · p times, rounded down or up; never if p is 0; NONE in a row without mass."""
    logits = tails(200, size)
    none = torch.isneginf(logits).all(1)
    at = (torch.rand(200, 1, dtype=torch.float64) + torch.arange(draws)) / draws
    ids = draw(logits.clone(), at, logits.amax(1))
    assert (ids[none] == NONE).all()
    assert (ids[~none] >= 0).all()
    expected = draws * logits[~none].double().softmax(-1)
    found = counts_of(ids[~none], size)
    assert (found >= (expected - 1e-4).floor()).all()
    assert (found <= (expected + 1e-4).ceil()).all()
    assert found[expected == 0].sum() == 0


def test_frequencies_over_many_hashes_are_the_probabilities() -> None:
    """Chi-square of a million draws."""
    logits = tails(2, 60)[1:]
    rows = 100_000
    rest = torch.arange(rows, dtype=torch.float32) / 7 + 3  # so many positions, one distribution
    at = places(Sampling(10, seed=5), rest, rest + 0.1)
    ids = draw(logits.repeat(rows, 1), at, logits.amax(1).repeat(rows))
    p = logits.double().softmax(-1)[0]
    found = counts_of(ids.flatten()[None], 60)[0]
    seen = p > 0
    # Systematic draws vary less than independent ones: the statistic is below chi-square's.
    statistic = ((found - 10 * rows * p)[seen] ** 2 / (10 * rows * p[seen])).sum()
    degrees = int(seen.sum()) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
    assert found[~seen].sum() == 0


def test_places_are_spread_evenly_and_differ_by_seed_and_position() -> None:
    rest = torch.randn(20_000) * 3 + 10
    at = places(Sampling(4, seed=1), rest, rest + 0.5)
    torch.testing.assert_close(at[:, 1:] - at[:, :-1], torch.full((20_000, 3), 0.25).double())
    u = 4 * at[:, 0]
    assert (u >= 0).all()
    assert (u < 1).all()
    assert np.abs(np.histogram(u, 20, (0, 1))[0] - 1000).max() < 5 * 1000**0.5
    assert torch.equal(at, places(Sampling(4, seed=1), rest, rest + 0.5))
    other = 4 * places(Sampling(4, seed=2), rest, rest + 0.5)[:, 0]
    near = 4 * places(Sampling(4, seed=1), rest, torch.nextafter(rest + 0.5, rest + 9))[:, 0]
    for one in (other, near, u.roll(1)):
        assert abs(np.corrcoef(u, one)[0, 1]) < 5 / 20_000**0.5


def test_the_hash_uses_every_bit() -> None:
    keys = torch.randint(-(1 << 62), 1 << 62, (5000,))
    before = uniform(keys)
    for bit in range(64):
        after = uniform(keys ^ torch.tensor(1).bitwise_left_shift(bit))
        assert abs(np.corrcoef(before, after)[0, 1]) < 5 / 5000**0.5


# ---- the gradient


def gradient(logits: Tensor, target: TopK) -> Tensor:
    """Gradient [P, V] of the forward KL to a record, summed over positions."""
    logits = logits.clone().requires_grad_()
    ids, logprobs = (torch.from_numpy(np.array(part)) for part in target.dense())
    tail = torch.from_numpy(target.tail_logprob).double()
    sparse_divergence(logits, ids.long(), logprobs.double(), tail).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("draws", [1, 12])
def test_the_gradient_is_unbiased_and_that_of_the_top_k_alone_is_not(k: int, draws: int) -> None:
    """The mean over many seeds is within its standard error of the full-vocabulary gradient."""
    torch.manual_seed(k + draws)
    rows, size, seeds = 6, 97, 4000
    base, logits = torch.randn(2, rows, size, dtype=torch.float64) * 2
    p = base.softmax(-1)
    wanted = logits.softmax(-1) - p
    best, ids = base.log_softmax(-1).topk(k)
    outside = base.scatter(1, ids, -torch.inf)
    rest, total = outside.logsumexp(-1), base.logsumexp(-1)

    at = torch.cat([places(Sampling(draws, seed), rest, total) for seed in range(seeds)])

    def each(values: Tensor) -> Tensor:
        return values.repeat(seeds, *[1] * (values.dim() - 1))

    drawn = draw(each(outside).float(), at, each(rest).float())
    record = TopK.from_dense(each(ids), each(best), each(rest - total), drawn)
    found = gradient(each(logits), record.spread_tail())
    mean = found.view(seeds, rows, size).mean(0)
    # An id gets N · p of N draws, rounded up with the probability of its fraction.
    fraction = (draws * outside.softmax(-1)) % 1
    tail = (rest - total).exp()[:, None]
    error = tail / draws * (fraction * (1 - fraction) / seeds).sqrt()
    # float32 sums in the record and in the draws add a bias of up to 1e-6.
    z = (mean - wanted).abs() / (error + 1e-6)
    # z of rare ids is not normal, as they are drawn few times; the mean of z² is still about 1.
    assert z.max() < 8
    assert (z**2).mean() < 1.5

    alone = gradient(logits, TopK.from_dense(ids, best, rest - total))
    off = (alone - wanted).abs() / (error + 1e-6)
    assert off.max() > 20
    assert (off**2).mean() > 10
