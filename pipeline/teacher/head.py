"""The head's answers: top-k and tail of logits, and how they are packed. It needs torch alone.

A GPU reads the logits once: `groups_of` takes the maximum and the logsumexp of groups of columns.
The k largest values are in the k groups with the largest maxima, and the tail is all other groups
and what these k leave over, so that nothing is subtracted. A CPU takes a few rows at a time, which
stay in its caches while it reads them twice.
"""

import torch
from torch import Tensor

try:
    from pipeline.teacher import head_triton
except ImportError:  # some platforms have no Triton; plain torch is used there
    head_triton = None  # type: ignore[assignment]

CACHE_BYTES = 1 << 23  # bytes of logits that a CPU processes at a time, to stay in its caches
GROUP = 8  # columns per maximum, see `largest`
GROUP_CUDA = 32  # columns per maximum and logsumexp, see `one_pass`; a power of two

TopRest = tuple[Tensor, Tensor, Tensor]


def rows_at_a_time(limit: int, vocab_size: int) -> int:
    return max(1, limit // (4 * vocab_size))


def top_and_rest(logits: Tensor, k: int) -> TopRest:
    """logits [N, V] -> the k best [N, k], their columns [N, k], logsumexp of all others [N].

    float32 logits become -inf at the k best. Values are float32. NaN shows up in a row's values.
    """
    if logits.is_cuda:
        return one_pass(logits, k)
    parts = logits.split(rows_at_a_time(CACHE_BYTES, logits.shape[1]))
    best, ids, rest = zip(*(top_and_rest_of(part.float(), k) for part in parts), strict=True)
    return torch.cat(best), torch.cat(ids), torch.cat(rest)


def one_pass(logits: Tensor, k: int, members: int = GROUP_CUDA) -> TopRest:
    """`top_and_rest` that reads the logits once, and then only what is left of the groups.

    1,766 rows of 151,936 logits take 1.19 ms on an H100, and 3.29 ms with torch.topk for the k best
    alone (scripts/benchmarks/bench_head.py). Another selection of whole rows, such as flashinfer's,
    needs a pass of its own for the tail.
    """
    groups = logits.shape[1] // members
    if not 0 < 4 * k <= groups:
        return top_and_rest_of(logits.float(), k)
    inside = groups * members
    top, lse = groups_of(logits, groups, members)
    _, chosen = largest(top, k, in_order=False)
    columns = chosen[:, None] + groups * torch.arange(members, device=logits.device)[:, None]
    over = torch.arange(inside, logits.shape[1], device=logits.device).expand(len(logits), -1)
    columns = torch.cat([columns.flatten(1), over], dim=1)
    candidates = logits.gather(1, columns).float()
    best, at = candidates.topk(k, dim=-1)
    ids = columns.gather(1, at)
    left = torch.cat(
        [lse.scatter_(1, chosen, -torch.inf), candidates.scatter_(1, at, -torch.inf)], dim=1
    )
    if logits.dtype == torch.float32:
        logits.scatter_(1, ids, -torch.inf)
    return best, ids, left.logsumexp(-1)


def groups_of(logits: Tensor, groups: int, members: int) -> tuple[Tensor, Tensor]:
    """Maximum and logsumexp of each group of columns c % groups, float32 [N, groups].

    Columns from groups * members on are left out.
    """
    if logits.is_cuda and head_triton is not None:
        return head_triton.groups_of(logits, groups, members)
    parts = logits[:, : groups * members].float().view(-1, members, groups)
    return parts.amax(1), parts.logsumexp(1)


def top_and_rest_of(logits: Tensor, k: int) -> TopRest:
    """`top_and_rest` of float32 logits, which become -inf at the k best."""
    if k >= logits.shape[1]:
        best, ids = logits.sort(dim=-1, descending=True)
        return best, ids, torch.full_like(best[:, 0], -torch.inf)
    best, ids = largest(logits, k + 1)
    following, target = best[:, k], ids[:, k]  # the largest of the others
    logits.scatter_(1, ids[:, :k], -torch.inf)
    # Cross-entropy is logsumexp - target in one pass; torch.logsumexp makes three.
    rest = torch.nn.functional.cross_entropy(logits, target, reduction="none") + following
    rest = torch.where(following == -torch.inf, following, rest)
    return best[:, :k], ids[:, :k], rest


def largest(values: Tensor, k: int, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """values.topk(k) over the last dimension of [N, V]; fast if V is far above k.

    Columns form groups. The k largest values are in the k groups with the largest maxima, which a
    recursive call finds. So one fast pass for the maxima leaves k * GROUP candidates.
    """
    size = values.shape[1]
    groups = size // GROUP
    if groups < 4 * k:
        best, ids = values.topk(k, dim=-1, sorted=in_order)
        return best, ids
    inside = GROUP * groups  # columns in groups; column c belongs to group c % groups
    members = values[:, :inside].view(-1, GROUP, groups)
    _, chosen = largest(members.amax(dim=1), k, in_order=False)
    candidates = members.gather(2, chosen[:, None].expand(-1, GROUP, -1)).flatten(1)
    candidates = torch.cat([candidates, values[:, inside:]], dim=1)
    best, at = candidates.topk(k, dim=-1, sorted=in_order)
    grouped = chosen.gather(1, at % k) + at.div(k, rounding_mode="floor") * groups
    return best, torch.where(at < GROUP * k, grouped, at + (inside - GROUP * k))


def as_integers(best: Tensor, ids: Tensor, rest: Tensor, total: Tensor) -> Tensor:
    """int32 [N, 1 + 2k]: log-probability of the tail, those of the k best (bit-cast), their ids.

    best, ids [N, k]; rest [N] the tail's logsumexp, total [N] that of all logits.
    """
    values = torch.cat([(rest - total)[:, None], best - total[:, None]], dim=1)
    return torch.cat([values.contiguous().view(torch.int32), ids.int()], dim=1)
