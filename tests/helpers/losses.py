"""Targets for tests of the losses."""

import pytest
import torch
from torch import Tensor

DIRECTIONS = ["forward", "reverse"]
both = pytest.mark.parametrize("direction", DIRECTIONS)


def teacher(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, logprobs, tail of the top k of softmax(logits)."""
    logprobs = logits.log_softmax(-1)
    kept, ids = logprobs.topk(k)
    rest = logprobs.scatter(1, ids, -torch.inf)
    return ids, kept, rest.logsumexp(1) if k < logits.shape[1] else rest[:, 0]


def ragged(ids: Tensor, logprobs: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep i % (k + 1) entries of row i, and move the others to its tail. Padding has id 0, as in
    a batch."""
    counts = torch.arange(len(ids)) % (ids.shape[1] + 1)
    drop = torch.arange(ids.shape[1]) >= counts[:, None]
    dropped = logprobs.masked_fill(~drop, -torch.inf).logsumexp(1)
    return (
        ids.masked_fill(drop, 0),
        logprobs.masked_fill(drop, -torch.inf),
        torch.logaddexp(tail, dropped),
    )
