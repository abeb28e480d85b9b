"""The fused loss and its Triton kernel against float64, within what rounding allows."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline import losses
from pipeline.losses import Direction, linear_sparse_divergence
from tests.gpu.device import DEVICE, REHEARSED
from tests.gpu.loss_bounds import Case, bounds_of, truth_of
from tests.gpu.measured import Measured
from tests.helpers.losses import ragged, teacher

pytestmark = pytest.mark.gpu


class Shape(NamedTuple):
    rows: int
    vocabulary: int
    width: int
    k: int


SMALL = [Shape(13, 41, 7, k) for k in (1, 5, 41)]
SMALL += [Shape(9, 300, 16, 1), Shape(9, 5000, 16, 64), Shape(256, 1000, 64, 32)]
SMALL += [Shape(33, 4096, 32, 8), Shape(33, 4097, 32, 8), Shape(3000, 2048, 64, 8)]
LARGE = [Shape(65, 50_257, 128, 5), Shape(64, 128_256, 256, 128), Shape(64, 151_936, 256, 64)]
LARGE += [Shape(40, 262_144, 128, 128)]
SHAPES = SMALL[:7] if REHEARSED else SMALL + LARGE
DTYPES = ["float64", "float32", "bfloat16", "autocast"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
FEATURES: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"scale": 0.5, "cap": 1.5},
    {"bias": True, "scale": 2.0, "cap": 30.0},
    {"itself": True},
]
"""itself: the student is the teacher, so that all gradients of the KL cancel."""

RANKS = 2.0
"""A power of two, by which gradients are multiplied and divided without a rounding."""


def name_of(shape: Shape) -> str:
    return f"{shape.rows} rows, V {shape.vocabulary}, k {shape.k}"


def by_shape(test: Any) -> Any:
    return pytest.mark.parametrize("shape", SHAPES, ids=name_of)(test)


def case_of(
    shape: Shape,
    rounded: torch.dtype,
    direction: Direction,
    bias: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
    itself: bool = False,
) -> Case:
    """A third of the rows are labels; each other row keeps its own number of entries, from none."""
    torch.manual_seed(shape.vocabulary + shape.k)
    rows, vocabulary, width, k = shape

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=torch.float64).to(rounded).double()

    hidden, weight = random(rows, width), (3 / width**0.5 * random(vocabulary, width))
    weight, domain = weight.to(rounded).double(), rows // 3
    shift = random(vocabulary) if bias else None
    z = hidden[domain:] @ weight.T
    if not itself:
        z = z + 2 * random(rows - domain, vocabulary)
    ids, logprobs, tail = (each.cpu() for each in teacher(z, k))
    if not itself:
        ids, logprobs, tail = ragged(ids, logprobs, tail)
    return Case(
        hidden=hidden,
        weight=weight,
        bias=shift,
        labels=torch.randint(vocabulary, (domain,), device=DEVICE),
        ids=ids.to(DEVICE),
        logprobs=logprobs.to(DEVICE),
        tail=tail.to(DEVICE),
        row_weights=torch.rand(rows, device=DEVICE, dtype=torch.float64).float().double(),
        direction=direction,
        scale=scale,
        cap=cap,
    )


def cases(shape: Shape, rounded: torch.dtype) -> Iterator[Case]:
    for direction in DIRECTIONS:
        for features in FEATURES:
            yield case_of(shape, rounded, direction, **features)


def fused(
    case: Case, stored: torch.dtype, autocast: bool, chunk_rows: int | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """(losses, gradients of hidden, weight and bias)"""
    given = [
        None if each is None else each.to(stored).requires_grad_()
        for each in (case.hidden, case.weight, case.bias)
    ]
    targets = torch.float64 if stored == torch.float64 else torch.float32
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
        total, rows = linear_sparse_divergence(
            given[0], given[1], case.ids, case.logprobs.to(targets), case.tail.to(targets),
            case.direction, labels=case.labels, row_weights=case.row_weights.to(targets),
            bias=given[2], logit_scale=case.scale, soft_cap=case.cap, chunk_rows=chunk_rows,
        )  # fmt: skip
    (RANKS * total).backward()  # as the trainer does on that many
    return rows, [None if each is None else each.grad / RANKS for each in given]


class Shares:
    """The largest errors, divided by their bounds, and the losses' in nats."""

    def __init__(self) -> None:
        self.shares = dict.fromkeys(
            ["loss", "hidden's gradient", "head's gradient", "bias's gradient"], 0.0
        )
        self.nats = 0.0

    def add(self, name: str, found: Tensor, expected: Tensor, bound: Tensor) -> None:
        share = float(((found.double() - expected).abs() / bound).max())
        self.shares[name] = share if share != share else max(self.shares[name], share)

    def compare(
        self, case: Case, stored: torch.dtype, autocast: bool, chunk_rows: int | None = None
    ) -> None:
        compute = torch.bfloat16 if autocast else stored
        truth = truth_of(case)
        bounds = bounds_of(case, truth, compute, stored)
        rows, (hidden, weight, bias) = fused(case, stored, autocast, chunk_rows)
        assert hidden is not None and weight is not None  # noqa: PT018
        self.nats = max(self.nats, float((rows.double() - truth.losses).abs().max()))
        self.add("loss", rows, truth.losses, bounds.losses)
        self.add("hidden's gradient", hidden, truth.hidden, bounds.hidden)
        self.add("head's gradient", weight, truth.weight, bounds.weight)
        if bias is not None and truth.bias is not None and bounds.bias is not None:
            self.add("bias's gradient", bias, truth.bias, bounds.bias)

    def tell(self, measured: Measured) -> None:
        measured("loss off by", self.nats, unit="nats")
        for name, share in self.shares.items():
            measured(f"{name}: error / bound", share, 1)


def dtypes_of(name: str) -> tuple[torch.dtype, torch.dtype, bool]:
    """(dtype of the numbers, of the parameters, whether autocast computes in bfloat16)"""
    autocast = name == "autocast"
    stored = torch.float32 if autocast else getattr(torch, name)
    return (torch.bfloat16 if autocast else stored), stored, autocast


@pytest.mark.parametrize("dtype", DTYPES)
@by_shape
def test_against_float64(shape: Shape, dtype: str, measured: Measured) -> None:
    """Loss and gradients are float64's up to rounding: both directions, bias, scale, soft cap."""
    rounded, stored, autocast = dtypes_of(dtype)
    shares = Shares()
    for case in cases(shape, rounded):
        shares.compare(case, stored, autocast)
    shares.tell(measured)


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_chunks(chunk_rows: int, dtype: str, measured: Measured) -> None:
    """The logits of few rows at a time, from one buffer, give the same loss and gradients."""
    rounded, stored, autocast = dtypes_of(dtype)
    shares = Shares()
    for direction in DIRECTIONS:
        case = case_of(Shape(130, 1000, 64, 32), rounded, direction, bias=True, cap=30.0)
        shares.compare(case, stored, autocast, chunk_rows)
    shares.tell(measured)


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
def test_ids_outside_the_vocabulary(dtype: str, measured: Measured) -> None:
    """Their rows' losses are NaN, which stops a run; all other rows are as without them."""
    rounded, stored, autocast = dtypes_of(dtype)
    case = case_of(Shape(40, 5000, 32, 8), rounded, "forward")
    expected, (before, *_) = fused(case, stored, autocast)
    domain, wrong = len(case.labels), [10, 17, 25]  # rows that keep entries
    assert (case.logprobs[wrong, 0] > -torch.inf).all()
    bad = case.ids.clone()
    for row, token in zip(wrong, (-3, 1 << 40, 5000), strict=True):
        bad[row, 0] = token
    if DEVICE == "cpu":
        pytest.skip("on a CPU torch itself refuses them")
    case.ids = bad
    found, (after, *_) = fused(case, stored, autocast)
    nan = found.isnan().nonzero()[:, 0].tolist()
    assert nan == [domain + row for row in wrong]
    others = ~found.isnan()
    assert before is not None and after is not None  # noqa: PT018
    measured("other rows differ by", (found - expected)[others].abs().max(), 0, unit="nats")
    measured("their gradients by", (after - before)[others].abs().max(), 0)


@pytest.mark.parametrize("gradient", ["float32", "bfloat16", "in place"])
@pytest.mark.parametrize("size", [41, 4096, 5000, 151_936])
def test_kernel_writes_nothing_beside_its_rows(
    size: int, gradient: str, measured: Measured
) -> None:
    """Canaries before, behind and between the rows of strided buffers; ids of every wrong kind."""
    if DEVICE == "cpu" or losses.losses_triton is None:
        pytest.skip("the kernel runs on CUDA alone; make test interprets it")
    rows, k, canary = 9, 5, 7.0
    case = case_of(Shape(rows + rows // 2 + 1, size, 8, k), torch.float32, "forward")
    ids, logprobs, tail = case.ids[:rows].clone(), case.logprobs[:rows], case.tail[:rows]
    ids[1, 0], ids[4, 0], ids[rows - 1, 0] = -1, 1 << 40, size
    logits = (case.hidden[-rows:] @ case.weight.T).float()

    def framed(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        whole = torch.full((rows + 2, size + 26), canary, dtype=dtype, device=DEVICE)
        return whole, whole[1:-1, 13 : 13 + size]

    around_z, z = framed(torch.float32)
    around, grad = (around_z, z) if gradient == "in place" else framed(getattr(torch, gradient))
    z.copy_(logits)
    found = losses.losses_triton.step(
        z, grad, ids, logprobs.float(), tail.float(), case.row_weights[:rows].float(), False, 0.0,
        losses.MIN_TAIL_LOGPROB,
    )  # fmt: skip
    valid = (logprobs > -torch.inf).any(1).tolist()
    assert found.isnan().nonzero()[:, 0].tolist() == [r for r in (1, 4, rows - 1) if valid[r]]
    written = 0
    for whole in (around_z, around):
        whole[1:-1, 13 : 13 + size] = canary
        written += int((whole != canary).sum())
    measured("numbers changed outside", written, 0)
