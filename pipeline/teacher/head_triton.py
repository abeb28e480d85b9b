"""Maximum and logsumexp of each group of columns, in one pass over the logits, for CUDA.

Column c belongs to group c % groups, so that neighbouring columns are read together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # logits that a program holds in registers
WARPS = 4


@triton.jit
def _groups(
    z_ptr, top_ptr, lse_ptr, groups, z_stride,
    MEMBERS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    member = tl.arange(0, MEMBERS)
    there = group < groups
    at = z_ptr + row * z_stride + member[:, None] * groups + group[None, :]
    z = tl.load(at, mask=there[None, :], other=float("-inf")).to(tl.float32)
    top = tl.max(z, axis=0)
    safe = tl.where(top > float("-inf"), top, 0.0)
    lse = safe + tl.log(tl.sum(tl.exp(z - safe[None, :]), axis=0))
    tl.store(top_ptr + row * groups + group, top, mask=there)
    tl.store(lse_ptr + row * groups + group, lse, mask=there)


def groups_of(logits: Tensor, groups: int, members: int) -> tuple[Tensor, Tensor]:
    """logits [N, V], V >= groups * members -> maximum and logsumexp of each group, float32
    [N, groups]; `members` is a power of two."""
    rows = len(logits)
    top = torch.empty(rows, groups, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(top)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    size = max(16, min(TILE // members, triton.next_power_of_2(groups)))
    if rows:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _groups[(rows, triton.cdiv(groups, size))](
                logits, top, lse, groups, logits.stride(0),
                MEMBERS=members, SIZE=size, num_warps=WARPS,
            )  # fmt: skip
    return top, lse
