"""Per-position measures of a model against its base, their sums, and bootstrap intervals.

All divergences are in nats. The tail measures cover what a top-k target leaves out: with K the
base's k best ids, and a and b the mass of base and model outside K, KL(base ‖ model) is the
divergence on {K, tail} plus a · KL of the two distributions *within* the tail (the chain rule).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.losses import MIN_TAIL_LOGPROB

# Positions whose distributions are held in float32 at a time; a few fit the caches of a CPU.
ROWS = {"cpu": 16, "cuda": 256}
BINS = 15  # calibration bins of equal width
RESAMPLES = 1000
Float64s = npt.NDArray[np.float64]

COLUMNS = (
    "nll",  # -log q(next token)
    "forward_kl",  # KL(base ‖ model), full vocabulary
    "reverse_kl",  # KL(model ‖ base), full vocabulary
    "agreement",  # 1 if the model's most likely token is the base's
    "tail_mass",  # a, the base's mass outside its tail_k best ids
    "tail_kl",  # a · KL(base ‖ model) within that tail
    "confidence",  # the model's largest probability
    "correct",  # 1 if the most likely token of the model is the next token
)


def measure(
    logits: Tensor, labels: Tensor, base_logits: Tensor | None, tail_k: int = 64
) -> Float64s:
    """float64 [N, COLUMNS] of logits [N, V], labels [N] and the base's logits [N, V'].

    Heads may differ in width. Columns that only the base has are padding, and left out. Those that
    only the model has are one outcome, where the base gave nothing; in the reverse divergence its
    log-probability there is MIN_TAIL_LOGPROB, as in the loss.

    Without a base, the divergences and the tail measures are 0, and the agreement is 1. Where the
    model's logits are NaN, so is every column about the model.
    """
    rows = ROWS.get(logits.device.type, 64)
    parts = [
        measure_rows(
            logits[at : at + rows],
            labels[at : at + rows],
            None if base_logits is None else base_logits[at : at + rows],
            tail_k,
        )
        for at in range(0, len(labels), rows)
    ]
    return np.concatenate([np.zeros((0, len(COLUMNS))), *parts])


def measure_rows(
    logits: Tensor, labels: Tensor, base_logits: Tensor | None, tail_k: int
) -> Float64s:
    log_q = logits.float().log_softmax(-1)
    confidence, best = log_q.max(1)
    zero = torch.zeros_like(confidence)
    unknown = 0 * confidence  # NaN has no most likely token
    found = dict.fromkeys(COLUMNS, zero) | {
        "nll": -log_q.gather(1, labels[:, None])[:, 0],
        "agreement": unknown + 1,
        "confidence": confidence.exp(),
        "correct": (best == labels) + unknown,
    }
    if base_logits is not None:
        width = log_q.shape[1]
        log_p = base_logits[:, :width].float().log_softmax(-1)
        extra = log_q[:, log_p.shape[1] :].logsumexp(1)  # -inf where the heads have one width
        beyond = torch.where(extra > -torch.inf, extra.exp() * (extra - MIN_TAIL_LOGPROB), 0)
        log_q = log_q[:, : log_p.shape[1]]
        gap = log_p - log_q
        base_best = log_p.max(1).indices  # computed as `best` is, so that ties agree
        p = log_p.exp_()
        kept_p, kept = p.topk(min(tail_k, p.shape[1]))
        # float64, because a tail is one minus the kept mass
        kept_gap, kept_p = gap.gather(1, kept).double(), kept_p.double()
        a = (1 - kept_p.sum(1)).clamp(min=0)
        b = 1 - (kept_p * (-kept_gap).exp()).sum(1)
        forward = torch.linalg.vecdot(p, gap)
        between = torch.where((a > 1e-6) & (b > 1e-6), a * (a / b).log(), 0)
        within = forward.double() - (kept_p * kept_gap).sum(1) - between
        found |= {
            "forward_kl": forward,
            "reverse_kl": beyond - torch.linalg.vecdot(log_q.exp(), gap),
            "agreement": (best == base_best) + unknown,
            "tail_mass": a,
            "tail_kl": torch.where(a > 1e-6, within, 0),
        }
    return torch.stack([found[name].double() for name in COLUMNS], 1).cpu().numpy()


@dataclass
class Sums:
    """Sums over targets; `a + b` adds two of them."""

    values: Float64s = field(default_factory=lambda: np.zeros(1 + len(COLUMNS)))
    """[1 + COLUMNS]: targets, then the sum of each column"""
    bins: Float64s = field(default_factory=lambda: np.zeros((3, BINS)))
    """[3, BINS]: targets, sum of confidence, and correct ones of each bin of confidence"""

    @classmethod
    def of(cls, rows: Float64s) -> "Sums":
        """Sum rows [N, COLUMNS]."""
        confidence, correct = (rows[:, COLUMNS.index(name)] for name in ("confidence", "correct"))
        bins = np.minimum((np.nan_to_num(confidence) * BINS).astype(int), BINS - 1)
        weights = [None, confidence, correct]
        counts = [np.bincount(bins, weight, BINS) for weight in weights]
        return cls(np.array([len(rows), *rows.sum(0)]), np.array(counts, np.float64))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.values + other.values, self.bins + other.bins)

    @property
    def tokens(self) -> float:
        return float(self.values[0])

    @property
    def nll(self) -> float:
        return float(self.values[1 + COLUMNS.index("nll")])

    @property
    def perplexity(self) -> float:
        """Infinity where it is too large for float64."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nll / self.tokens))

    def report(self) -> dict[str, float]:
        """Means per target, for JSON; "tokens" counts targets.

        tail_kl is the KL within the tail, weighted by tail mass.
        """
        mean = dict(zip(COLUMNS, (self.values[1:] / self.tokens).tolist(), strict=True))
        _, confidence, correct = self.bins
        return {
            "tokens": int(self.tokens),
            "perplexity": self.perplexity,
            "nats_per_token": mean["nll"],
            "forward_kl": mean["forward_kl"],
            "reverse_kl": mean["reverse_kl"],
            "top1_agreement": mean["agreement"],
            "top1_accuracy": mean["correct"],
            "tail_mass": mean["tail_mass"],
            "tail_kl": mean["tail_kl"] / mean["tail_mass"] if mean["tail_mass"] else 0.0,
            "ece": float(np.abs(confidence - correct).sum() / self.tokens),
        }


def by_document(sums: list[Sums], documents: npt.NDArray[np.int64]) -> Float64s:
    """[D, 1 + COLUMNS]: the sums of each document, from its sequences' sums.

    `documents` [len(sums)] has the document number of each sequence.
    """
    names, index = np.unique(documents, return_inverse=True)
    total = np.zeros((len(names), 1 + len(COLUMNS)))
    np.add.at(total, index, np.array([of.values for of in sums]))
    return total


def intervals(documents: Float64s, base: Float64s, seed: int = 0) -> dict[str, Any]:
    """95 % bootstrap intervals, each [low, high].

    documents, base  [D, 1 + COLUMNS] of the model and of its base on the same text

    It resamples documents, not tokens, because tokens depend on their neighbours. nats_change is
    the model's nats per token minus the base's on the same resampled documents.
    """
    number = len(documents)
    draws = np.random.default_rng(seed).multinomial(
        number, np.full(number, 1 / number), size=RESAMPLES
    )
    with np.errstate(invalid="ignore"):
        drawn, drawn_base = draws @ documents, draws @ base

    def mean(name: str, of: Float64s) -> Float64s:
        return np.asarray(of[:, 1 + COLUMNS.index(name)] / of[:, 0])

    def interval(values: Float64s) -> list[float]:
        # There is nothing between two infinities.
        method: Any = "linear" if np.isfinite(values).all() else "nearest"
        return [float(value) for value in np.percentile(values, [2.5, 97.5], method=method)]

    with np.errstate(over="ignore", invalid="ignore"):  # a model that diverged
        return {
            "perplexity": interval(np.exp(mean("nll", drawn))),
            "forward_kl": interval(mean("forward_kl", drawn)),
            "reverse_kl": interval(mean("reverse_kl", drawn)),
            "nats_change": interval(mean("nll", drawn) - mean("nll", drawn_base)),
        }
