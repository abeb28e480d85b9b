"""Time, peak memory and gradient error of the losses, forward and backward, on equal shapes.

    python scripts/benchmarks/bench_loss.py
    python scripts/benchmarks/bench_loss.py --rows 8192 --width 4096 --vocabulary 151936 128256 \\
        --dtype bfloat16

Each case computes a scalar from hidden states and a head's weight, and the gradients of both; the
last one is no loss, but the three matrix products that a loss cannot do without. All cases run in
turn, on a CPU in several rounds of a process each. The time is the median of the steps on a GPU, by
CUDA events, and the fastest on a CPU; beside it stands the ratio to plain cross-entropy
(`F.cross_entropy` on full logits). Memory is the peak above the inputs: of the resident set on a
CPU, of the allocator on a GPU. The gradient error is relative to the same loss in float64, on
`--error_rows` rows; 0 turns it off. Kernels of other projects run where their packages are
installed: liger-kernel (its CuTe kernels with nvidia-cutlass-dsl, its cuTile ones with cuda-tile),
quack-kernels, cut-cross-entropy.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from inspect import signature

import torch
from processes import Result, failure, hardware, in_turn, measured, on_gpu
from torch import Tensor
from torch.nn import functional as F

from pipeline.losses import BUFFER_BYTES, linear_sparse_divergence, sparse_divergence

Inputs = dict[str, Tensor]
Loss = Callable[[Inputs], Tensor]


def dense_ce(x: Inputs) -> Tensor:
    return F.cross_entropy((x["hidden"] @ x["weight"].T).float(), x["labels"])


def dense_kl(x: Inputs) -> Tensor:
    """KL over the full vocabulary to a teacher that is in memory: online distillation."""
    log_q = (x["hidden"] @ x["weight"].T).float().log_softmax(-1)
    log_p = (x["teacher_hidden"] @ x["weight"].detach().T).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def dense_topk(x: Inputs) -> Tensor:
    """The sparse divergence on full logits, through autograd."""
    logits = (x["hidden"] @ x["weight"].T).float()
    return sparse_divergence(logits, x["ids"], x["logprobs"], x["tail"]).mean()


def chunked_topk(x: Inputs) -> Tensor:
    """The same in chunks of rows; backward recomputes the logits of each chunk."""
    from torch.utils.checkpoint import checkpoint

    def part(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
        return sparse_divergence((hidden @ weight.T).float(), ids, logprobs, tail).sum()

    size = max(16, BUFFER_BYTES[x["hidden"].device.type] // (4 * len(x["weight"])))
    total = x["hidden"].new_zeros((), dtype=torch.float32)
    for at in range(0, len(x["hidden"]), size):
        rows = slice(at, at + size)
        parts = [x["hidden"][rows], x["weight"]]
        parts += [x[name][rows] for name in ("ids", "logprobs", "tail")]
        total = total + checkpoint(part, *parts, use_reentrant=False)
    return total / len(x["hidden"])


def fused(direction: str | None) -> Loss:
    """The project's own loss; cross-entropy if `direction` is None."""

    def loss(x: Inputs) -> Tensor:
        rows = len(x["hidden"])
        weights = torch.full((rows,), 1 / rows, device=x["hidden"].device)
        if direction is None:
            targets = [x[name][:0] for name in ("ids", "logprobs", "tail")]
            total, _ = linear_sparse_divergence(
                x["hidden"], x["weight"], *targets, labels=x["labels"], row_weights=weights
            )
        else:
            targets = [x[name] for name in ("ids", "logprobs", "tail")]
            total, _ = linear_sparse_divergence(
                x["hidden"],
                x["weight"],
                *targets,
                direction,
                row_weights=weights,  # type: ignore[arg-type]
            )
        return total

    return loss


def compiled(loss: Loss) -> Loss:
    """The loss through torch.compile."""
    made = cache(lambda: torch.compile(loss, dynamic=False))
    return lambda x: made()(x)


def products(x: Inputs) -> Tensor:
    """The three matrix products of a head: no loss computes both gradients with less."""
    logits = x["hidden"] @ x["weight"].T
    logits.backward(logits.detach())
    return logits


def liger_ce(x: Inputs, **more: object) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    given = {"_input": x["hidden"], "weight": x["weight"], "target": x["labels"]} | more
    names = list(signature(LigerFusedLinearCrossEntropyFunction.forward).parameters.values())[1:]
    loss = LigerFusedLinearCrossEntropyFunction.apply(
        *(given.get(one.name, one.default) for one in names)
    )
    return loss[0] if isinstance(loss, tuple) else loss


def liger_large_ce(x: Inputs) -> Tensor:
    """Triton's kernel on chunks of 2,048 rows at N = 8,192, instead of 256: faster, more memory."""
    return liger_ce(x, chunk_mem_const=8)


def liger_cute_ce(x: Inputs) -> Tensor:
    """The kernels for Hopper; Blackwell has others, which `LIGER_KERNEL_IMPL=cutedsl` chooses."""
    if torch.cuda.get_device_capability()[0] == 9:
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
            liger_fused_linear_cross_entropy_sm90 as function,
        )
    else:
        from liger_kernel.ops.cutedsl.ops import LigerFusedLinearCrossEntropyFunction

        function = LigerFusedLinearCrossEntropyFunction.apply
    loss = function(x["hidden"], x["weight"], x["labels"])
    return loss[0] if isinstance(loss, tuple) else loss


def liger_tile_ce(x: Inputs) -> Tensor:
    from liger_kernel.ops.cutile.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction,
    )

    loss = LigerFusedLinearCrossEntropyFunction.apply(x["hidden"], x["weight"], x["labels"])
    return loss[0] if isinstance(loss, tuple) else loss


def quack_ce(x: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(x["hidden"], x["weight"], x["labels"], tuned=False)
    return loss


def cut_ce(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(x["hidden"], x["weight"], x["labels"])
    return loss


BASE = "cross-entropy, F.cross_entropy"
PRODUCTS = "matrix products alone"
CASES: dict[str, Loss] = {
    BASE: dense_ce,
    "cross-entropy, fused": fused(None),
    "cross-entropy, liger-kernel": liger_ce,
    "cross-entropy, liger-kernel, chunks × 8": liger_large_ce,
    "cross-entropy, liger-kernel, CuTe": liger_cute_ce,
    "cross-entropy, liger-kernel, cuTile": liger_tile_ce,
    "cross-entropy, quack": quack_ce,
    "cross-entropy, cut-cross-entropy": cut_ce,
    "cross-entropy, compiled": compiled(dense_ce),
    "top-k forward KL, fused": fused("forward"),
    "top-k reverse KL, fused": fused("reverse"),
    "top-k forward KL, full logits": dense_topk,
    "top-k forward KL, chunked, recomputed": chunked_topk,
    "top-k forward KL, compiled": compiled(dense_topk),
    "full KL, teacher's logits at hand": dense_kl,
    PRODUCTS: products,
}


# Kernels of other projects, if these modules are installed. They need CUDA.
PACKAGES = {
    "cross-entropy, liger-kernel": ["liger_kernel"],
    "cross-entropy, liger-kernel, chunks × 8": ["liger_kernel"],
    "cross-entropy, liger-kernel, CuTe": ["liger_kernel", "cutlass"],
    "cross-entropy, liger-kernel, cuTile": ["liger_kernel", "cuda.tile"],
    "cross-entropy, quack": ["quack", "cutlass"],
    "cross-entropy, cut-cross-entropy": ["cut_cross_entropy"],
}


def missing(case: str, dtype: str) -> str | None:
    """Why a case cannot run here; None if it can."""
    if case not in PACKAGES and "compiled" not in case:
        return None
    if not on_gpu():
        return "not on CPU"
    if dtype == "float32" and PACKAGES.get(case, ["liger_kernel"]) != ["liger_kernel"]:
        return "bfloat16 only"
    there = (installed(module) for module in PACKAGES.get(case, []))
    return None if all(there) else "not installed"


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False


@lru_cache(2)
def make_inputs(
    rows: int, width: int, vocabulary: int, k: int, dtype_name: str, device: str
) -> Inputs:
    """Hidden states and a head whose logits have a standard deviation of about 2, and a teacher
    close to them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    dtype = getattr(torch, dtype_name)
    hidden = normal(rows, width)
    weight = (2 / math.sqrt(width) * normal(vocabulary, width)).to(dtype)
    teacher = (hidden + 0.3 * normal(rows, width)).to(dtype)
    ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, k, device=device)
    tail = torch.empty(rows, device=device)
    for at in range(0, rows, 256):  # the teacher's full logits may not fit in memory
        part = slice(at, at + 256)
        full = (teacher[part] @ weight.T).float().log_softmax(-1)
        logprobs[part], ids[part] = full.topk(k)
        tail[part] = full.scatter(1, ids[part], -torch.inf).logsumexp(-1)
    labels = ids[:, 0].clone()
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.requires_grad_(),
        "teacher_hidden": teacher,
        "labels": labels,
        "ids": ids,
        "logprobs": logprobs,
        "tail": tail,
    }


def run_job(given: argparse.Namespace, job: str, errors: bool) -> Result:
    """Seconds and peak bytes of "vocabulary case" in this process, and its gradients' errors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary, case = job.split(" ", 1)
    shape = (given.width, int(vocabulary), given.k, given.dtype, device)
    x = make_inputs(given.rows, *shape)
    found = measured(lambda: step(CASES[case], x), given.repeats, device)
    x["hidden"].grad = x["weight"].grad = None
    if errors and given.error_rows and case != PRODUCTS:
        found |= gradient_errors(case, make_inputs(given.error_rows, *shape))
    return found


def step(loss: Loss, x: Inputs) -> None:
    x["hidden"].grad = x["weight"].grad = None
    value = loss(x)
    if value.ndim == 0:
        value.backward()


def gradient_errors(case: str, x: Inputs) -> Result:
    """Size of each gradient's difference from that of float64, as a share of its size."""
    step(CASES[case], x)
    exact = {name: value.detach().double() for name, value in x.items()}
    exact["ids"], exact["labels"] = x["ids"], x["labels"]
    for name in ("hidden", "weight"):
        exact[name].requires_grad_()
    REFERENCES[case](exact).backward()
    errors = {}
    for name in ("hidden", "weight"):
        one, other = x[name].grad, exact[name].grad
        assert one is not None
        assert other is not None
        errors[f"{name}_error"] = ((one.double() - other).norm() / other.norm()).item()
        x[name].grad = None
    return errors


def reference(direction: str | None) -> Loss:
    """The same loss in float64 through autograd on full logits."""

    def loss(x: Inputs) -> Tensor:
        logits = x["hidden"] @ x["weight"].T
        if direction is None:
            return F.cross_entropy(logits, x["labels"])
        if direction == "full":
            log_p = (x["teacher_hidden"] @ x["weight"].detach().T).log_softmax(-1)
            return F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="batchmean")
        rows = sparse_divergence(logits, x["ids"], x["logprobs"], x["tail"], direction)  # type: ignore[arg-type]
        return rows.mean()

    return loss


REFERENCES = {
    name: reference(
        "reverse"
        if "reverse" in name
        else "full"
        if "full KL" in name
        else None
        if "cross" in name
        else "forward"
    )
    for name in CASES
}


def show(given: argparse.Namespace, vocabulary: int, runs: dict[str, list[Result]]) -> None:
    print(
        f"N {given.rows:,}  D {given.width:,}  V {vocabulary:,}  k {given.k}  {given.dtype}  "
        f"{hardware()}"
    )
    print(f"{'':<40}{'seconds':>9}{'time':>8}{'MiB':>8}{'memory':>8}{'∂hidden':>10}{'∂weight':>10}")
    base = runs[f"{vocabulary} {BASE}"]
    for case in given.chosen:
        found = runs.get(f"{vocabulary} {case}", [])
        why = missing(case, given.dtype) or failure(found)
        if why:
            print(f"{case:<40}  {why}")
            continue
        seconds = min(one["seconds"] for one in found)
        errors = "".join(
            f"{found[0][key]:>10.1e}" for key in ("hidden_error", "weight_error") if key in found[0]
        )
        ratios = ["", ""]
        if not failure(base):
            ratios[0] = f"{seconds / min(one['seconds'] for one in base):.2f}×"
            ratios[1] = f"{found[0]['bytes'] / base[0]['bytes']:.2f}×"
        print(
            f"{case:<40}{seconds:>9.{4 if seconds < 0.1 else 3}f}{ratios[0]:>8}"
            f"{found[0]['bytes'] / 2**20:>8.0f}{ratios[1]:>8}{errors}"
        )


def main(words: list[str] | None = None) -> bool:
    """Returns whether a case of the project's own failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="positions N")
    parser.add_argument("--width", type=int, default=512, help="hidden size D")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768], help="V, several")
    parser.add_argument("--k", type=int, default=64, help="entries of a distribution")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, help="default: 3 on a CPU, 1 on a GPU")
    parser.add_argument("--repeats", type=int, help="steps of a case; default: 3, on a GPU 10")
    parser.add_argument(
        "--error_rows", type=int, default=128, help="rows for the gradient error; 0 turns it off"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="what is not done by then is left out"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="run this case only")
    given = parser.parse_args(words)
    given.rounds = given.rounds or (1 if on_gpu() else 3)
    given.repeats = given.repeats or (10 if on_gpu() else 3)
    given.chosen = [case for case in CASES if case in [BASE, *(given.case or CASES)]]
    able = [case for case in given.chosen if missing(case, given.dtype) is None]
    # What compiles or tunes its kernels first is last, and is left out if time runs out.
    jobs = [
        f"{vocabulary} {case}"
        for late in (False, True)
        for vocabulary in given.vocabulary
        for case in able
        if late == ("compiled" in case or case in PACKAGES)
    ]
    runs = in_turn(
        jobs, given.rounds, lambda job, number: run_job(given, job, not number), given.seconds
    )
    for vocabulary in given.vocabulary:
        show(given, vocabulary, runs)
    ours = [job for job in jobs if job.split(" ", 1)[1] not in PACKAGES]
    return any(failure(runs[job]) for job in ours)


if __name__ == "__main__":
    sys.exit(main())
