"""The head step of stage one, top-k and tail of logits, on the device against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.teacher import head
from tests.gpu.device import DEVICE, REHEARSED
from tests.gpu.loss_bounds import ROUNDS, U32
from tests.gpu.measured import Measured

pytestmark = pytest.mark.gpu

SIZES = [5, 64, 1000, 4099, 33_000] + [50_257, 128_256, 151_936, 262_144] * (not REHEARSED)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def logits_of(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """One row has many ties, one a value far above the others, one only -inf but for a few."""
    torch.manual_seed(size)
    logits = (4 * torch.randn(rows, size)).to(dtype).to(DEVICE)
    logits[0, : size // 2] = 80
    logits[1, 0] = 200
    logits[2, 3:] = -torch.inf
    return logits


@DTYPES
@pytest.mark.parametrize("k", [1, 4, 64, 128])
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(size: int, k: int, dtype: torch.dtype, measured: Measured) -> None:
    """The k best are the k best, bit for bit; the tail is float64's up to rounding."""
    logits = logits_of(7 if REHEARSED else 300, size, dtype)
    exact, kept = logits.double(), min(k, size)
    best, ids, rest = head.top_and_rest(logits, k)
    assert best.shape == ids.shape == (len(exact), kept)
    wanted = exact.topk(kept).values
    measured("values that differ", (best.double() != wanted).sum(), 0)
    measured("ids of other values", (exact.gather(1, ids) != wanted).sum(), 0)
    repeated = (ids.sort(1).values.diff(dim=1) == 0).sum()
    measured("ids given twice", repeated, 0)
    others = exact.scatter(1, ids, -torch.inf).logsumexp(-1)
    same = torch.isneginf(others) == torch.isneginf(rest)
    measured("tails without mass that differ", (~same).sum(), 0)
    finite = torch.isfinite(others)
    off = (rest.double() - others)[finite].abs() if finite.any() else torch.zeros(1, device=DEVICE)
    size_of = others[finite].abs().max() if finite.any() else 0.0
    measured("tail off by", off.max(), ROUNDS * U32 * (1 + float(size_of)), unit="nats")


@DTYPES
def test_rows_within_a_wider_tensor(dtype: torch.dtype, measured: Measured) -> None:
    """A rank's columns without their padding, which holds larger values and NaN."""
    wide = torch.randn(64, 33_024, device=DEVICE).to(dtype)
    wide[:, 33_000:] = 99
    wide[:, 33_010:] = torch.nan
    alone = head.top_and_rest(wide[:, :33_000].clone(), 64)
    found = head.top_and_rest(wide[:, :33_000], 64)
    for name, one, other in zip(("values", "ids", "tails"), found, alone, strict=True):
        measured(f"{name} that differ", (one != other).sum(), 0)


@DTYPES
@pytest.mark.parametrize("at", [0, 1234, 32_999])
def test_nan_shows(at: int, dtype: torch.dtype, measured: Measured) -> None:
    """NaN in a row shows up in this row, and in no other one."""
    logits = torch.randn(9, 33_000, device=DEVICE).to(dtype)
    logits[4, at] = torch.nan
    best, _, rest = head.top_and_rest(logits, 64)
    shown = best.isnan().any(1) | rest.isnan()
    measured("its own row", shown[4], least=1)
    measured("other rows", shown.sum() - shown[4].long(), 0)


def test_packed_rows(measured: Measured) -> None:
    """What leaves the device holds tail, log-probabilities and ids, bit for bit."""
    logits = torch.randn(64, 33_000, device=DEVICE)
    total = logits.double().logsumexp(-1).float()
    found: Any = head.top_and_rest(logits.clone(), 16)
    best, ids, rest = found
    packed = head.as_integers(best, ids, rest, total).cpu()
    assert packed.shape == (64, 33)
    assert packed.dtype == torch.int32
    values = packed[:, :17].contiguous().view(torch.float32)
    measured("ids that differ", (packed[:, 17:] != ids.cpu().int()).sum(), 0)
    mass = values.double().exp().sum(1)
    measured("mass off 1 by", (mass - 1).abs().max(), ROUNDS * U32 * 30)
