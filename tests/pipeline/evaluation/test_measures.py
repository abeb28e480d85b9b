"""Sums, bins and bootstrap intervals on numbers whose answer is known."""

import math

import numpy as np
import pytest
import torch

from pipeline.evaluation.measures import COLUMNS, Sums, by_document, intervals, measure


def rows(number: int, **columns: object) -> np.ndarray:
    return np.stack([np.broadcast_to(columns.get(name, 0.0), number) for name in COLUMNS], 1)


def test_calibration_of_known_bins() -> None:
    sure = rows(10, confidence=0.95, correct=[1] * 7 + [0] * 3)
    unsure = rows(30, confidence=0.25, correct=[1] * 9 + [0] * 21)
    both = Sums.of(sure) + Sums.of(unsure)
    assert both.report()["ece"] == pytest.approx(0.25 * 0.25 + 0.75 * 0.05)
    assert Sums.of(rows(4, confidence=1.0, correct=1)).report()["ece"] == 0


def test_a_model_agrees_with_itself_where_logits_tie() -> None:
    """bfloat16 logits tie often, and top-k breaks ties in another order than max."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 500, generator=generator).bfloat16()
    labels = torch.zeros(2000, dtype=torch.long)
    ties = (logits == logits.amax(1, keepdim=True)).sum(1) > 1
    assert ties.sum() > 20
    assert Sums.of(measure(logits, labels, logits)).report()["top1_agreement"] == 1


def test_tail_with_little_mass_is_exact() -> None:
    """Tails of 1e-4 in float32 logits, against the definition in float64."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, 200, generator=generator)
    base[:, :5] += 12
    model = base + torch.randn(50, 200, generator=generator)
    found = Sums.of(measure(model, torch.zeros(50, dtype=torch.long), base, tail_k=5)).report()
    p, q = base.double().log_softmax(1), model.double().log_softmax(1)
    a = p[:, 5:].exp().sum(1)
    within = p[:, 5:].log_softmax(1), q[:, 5:].log_softmax(1)
    kl = (within[0].exp() * (within[0] - within[1])).sum(1)
    assert a.mean() < 1e-3
    assert found["tail_mass"] == pytest.approx(a.mean().item(), rel=1e-2)
    assert found["tail_kl"] == pytest.approx(((a * kl).sum() / a.sum()).item(), rel=1e-2)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Documents of very different lengths; the truth is the mean that they are drawn around."""
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        tokens = generator.integers(5, 200, 60)
        nll = tokens * generator.normal(3.0, 0.5, 60)
        documents = np.zeros((60, 1 + len(COLUMNS)))
        documents[:, 0], documents[:, 1] = tokens, nll
        low, high = intervals(documents, documents, seed)["perplexity"]
        hits += low < math.exp(3.0) < high
    assert 0.88 <= hits / 200 <= 0.99


def test_change_is_taken_on_the_same_documents() -> None:
    base = [Sums.of(rows(10, nll=float(level))) for level in range(1, 21)]
    model = [Sums.of(rows(10, nll=level + 0.25)) for level in range(1, 21)]
    documents = np.repeat(np.arange(10), 2)  # two sequences each
    found = intervals(by_document(model, documents), by_document(base, documents))
    assert found["nats_change"] == pytest.approx([0.25, 0.25])
    low, high = np.log(found["perplexity"])
    assert low < 10.75 < high
    assert high - low > 1


def test_a_model_of_nan_measures_nan() -> None:
    """And not the number of a token that NaN happens to choose."""
    base = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    found = Sums.of(measure(base * math.nan, base.argmax(1), base, tail_k=5)).report()
    assert found.pop("tokens") == 8
    assert 0 < found.pop("tail_mass") < 1  # the base's own
    assert all(math.isnan(value) for value in found.values()), found


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    sums = Sums.of(rows(4, nll=800.0))
    assert sums.perplexity == math.inf
    documents = by_document([sums, Sums.of(rows(4, nll=1.0))], np.array([0, 1]))
    low, high = intervals(documents, documents)["perplexity"]
    assert low == pytest.approx(math.e)
    assert high == math.inf


@pytest.mark.parametrize(("width", "base_width"), [(30, 20), (20, 30)])
def test_heads_of_two_widths(width: int, base_width: int) -> None:
    """Against the definition in float64: the model's own columns are one outcome, where the base
    gave e^-30; the base's own are padding."""
    torch.manual_seed(0)
    logits, base = torch.randn(9, width), torch.randn(9, base_width)
    labels = torch.arange(9)
    found = Sums.of(measure(logits, labels, base, tail_k=4)).report()
    q, p = logits.double().softmax(1), base[:, :width].double().softmax(1)
    shared = p.shape[1]
    e = q[:, shared:].sum(1)
    forward = (p * (p / q[:, :shared]).log()).sum(1)
    reverse = (
        (q[:, :shared] * (q[:, :shared] / p).log()).sum(1) + torch.special.xlogy(e, e) + 30 * e
    )
    assert found["forward_kl"] == pytest.approx(forward.mean().item(), rel=1e-5)
    assert found["reverse_kl"] == pytest.approx(reverse.mean().item(), rel=1e-5)
    kept = p.topk(4)
    mass = q[:, :shared].gather(1, kept.indices)
    a, b = 1 - kept.values.sum(1), 1 - mass.sum(1)
    within = forward - (kept.values * (kept.values / mass).log()).sum(1) - a * (a / b).log()
    assert found["tail_kl"] == pytest.approx((within.mean() / a.mean()).item(), rel=1e-4)
    nll = -q.log()[torch.arange(9), labels].mean().item()
    assert found["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)
