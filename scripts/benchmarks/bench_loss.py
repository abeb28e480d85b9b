"""Time, peak memory and gradient error of the losses, forward and backward, on equal shapes.

    python scripts/benchmarks/bench_loss.py
    python scripts/benchmarks/bench_loss.py --rows 8192 --width 4096 --vocabulary 151936 \\
        --dtype bfloat16

Each case computes a scalar from hidden states and a head's weight, and the gradients of both. It
runs in a process of its own; several rounds run all cases in turn. The table shows the fastest
round, as a ratio to plain cross-entropy (`F.cross_entropy` on full logits). Memory is the peak
above the inputs: of the resident set on a CPU, of the allocator on a GPU. The gradient error is
relative to the same loss in float64, on `--error_rows` rows; 0 turns it off.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from processes import hardware, in_turn, peak, reset_peak
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


def liger_ce(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(x["weight"], x["hidden"], x["labels"])
    return loss


def cut_ce(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(x["hidden"], x["weight"], x["labels"])
    return loss


CASES: dict[str, Loss] = {
    "cross-entropy, F.cross_entropy": dense_ce,
    "cross-entropy, fused": fused(None),
    "cross-entropy, liger-kernel": liger_ce,
    "cross-entropy, cut-cross-entropy": cut_ce,
    "top-k forward KL, fused": fused("forward"),
    "top-k reverse KL, fused": fused("reverse"),
    "top-k forward KL, full logits": dense_topk,
    "top-k forward KL, chunked, recomputed": chunked_topk,
    "full KL, teacher's logits at hand": dense_kl,
}


# Kernels of other projects, if their packages are installed. They need CUDA.
PACKAGES = {
    "cross-entropy, liger-kernel": "liger_kernel",
    "cross-entropy, cut-cross-entropy": "cut_cross_entropy",
}


def missing(case: str, dtype: str) -> str | None:
    """Why a case cannot run here; None if it can."""
    if case not in PACKAGES:
        return None
    if not torch.cuda.is_available():
        return "not on CPU"
    if PACKAGES[case] == "cut_cross_entropy" and dtype == "float32":
        return "bfloat16 only"
    return None if find_spec(PACKAGES[case]) else "not installed"


def make_inputs(given: argparse.Namespace, rows: int, device: str) -> Inputs:
    """Hidden states and a head whose logits have a standard deviation of about 2, and a teacher
    close to them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    dtype = getattr(torch, given.dtype)
    hidden = normal(rows, given.width)
    weight = (2 / math.sqrt(given.width) * normal(given.vocabulary, given.width)).to(dtype)
    teacher = (hidden + 0.3 * normal(rows, given.width)).to(dtype)
    ids = torch.empty(rows, given.k, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, given.k, device=device)
    tail = torch.empty(rows, device=device)
    for at in range(0, rows, 256):  # the teacher's full logits may not fit in memory
        part = slice(at, at + 256)
        full = (teacher[part] @ weight.T).float().log_softmax(-1)
        logprobs[part], ids[part] = full.topk(given.k)
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


def run_case(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds (fastest) and peak bytes of one case, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, loss = make_inputs(given, given.rows, device), CASES[given.case]
    times, before = [], reset_peak(device)
    for _ in range(given.repeats):
        x["hidden"].grad = x["weight"].grad = None
        began = time.perf_counter()
        loss(x).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    found: dict[str, Any] = {"seconds": min(times), "bytes": peak(device) - before}
    if given.error_rows:
        x = make_inputs(given, given.error_rows, device)
        loss(x).backward()
        exact = {name: value.detach().double() for name, value in x.items()}
        exact["ids"], exact["labels"] = x["ids"], x["labels"]
        for name in ("hidden", "weight"):
            exact[name].requires_grad_()
        REFERENCES[given.case](exact).backward()
        for name in ("hidden", "weight"):
            one, other = x[name].grad, exact[name].grad
            assert one is not None
            assert other is not None
            found[f"{name}_error"] = ((one.double() - other).norm() / other.norm()).item()
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="positions N")
    parser.add_argument("--width", type=int, default=512, help="hidden size D")
    parser.add_argument("--vocabulary", type=int, default=32768, help="V")
    parser.add_argument("--k", type=int, default=64, help="entries of a distribution")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="processes per case")
    parser.add_argument("--repeats", type=int, default=3, help="steps per process")
    parser.add_argument(
        "--error_rows", type=int, default=128, help="rows for the gradient error; 0 turns it off"
    )
    parser.add_argument("--case", choices=CASES, help="run one case and print JSON")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run_case(given)))
        return
    able = [case for case in CASES if missing(case, given.dtype) is None]
    runs = in_turn(able, given.rounds, {"--error_rows": "0"})
    best = {
        name: found[0] | {"seconds": min(one["seconds"] for one in found)}
        for name, found in runs.items()
    }
    print(
        f"N {given.rows:,}  D {given.width:,}  V {given.vocabulary:,}  k {given.k}  {given.dtype}  "
        f"{hardware()}"
    )
    print(f"{'':<40}{'seconds':>9}{'time':>8}{'MiB':>8}{'memory':>8}{'∂hidden':>10}{'∂weight':>10}")
    base = best["cross-entropy, F.cross_entropy"]
    for name in CASES:
        if name not in best:
            print(f"{name:<40}  {missing(name, given.dtype)}")
            continue
        found = best[name]
        errors = "".join(
            f"{found[key]:>10.1e}" for key in ("hidden_error", "weight_error") if key in found
        )
        print(
            f"{name:<40}{found['seconds']:>9.3f}{found['seconds'] / base['seconds']:>7.2f}×"
            f"{found['bytes'] / 2**20:>8.0f}{found['bytes'] / base['bytes']:>7.2f}×{errors}"
        )


if __name__ == "__main__":
    main()
