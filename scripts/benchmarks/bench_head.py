"""The head step of stage one: from hidden states to the packed answers, and what each part takes.

    python scripts/benchmarks/bench_head.py
    python scripts/benchmarks/bench_head.py --rows 1766 --width 4096 --vocabulary 151936

The product of hidden states and head, in bfloat16 with float32 sums and logits, as vLLM computes it
for pooling; then the k largest logits of each row and the logsumexp of the others, by each way that
there is (flashinfer where it is installed); then packing, and the copy to the CPU. Beside the time
stands how often the logits could be read from memory in it, at the rate of a copy, and the share of
the time that the same positions take in the matrix products of a body of --body parameters, at the
rate of the head's product. Errors are the largest ones against float64; ids must be those of the
largest logits. No vLLM is needed.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import lru_cache

import torch
from processes import Result, failure, hardware, in_turn, measured, on_gpu
from torch import Tensor

from pipeline.teacher import head

Answer = tuple[Tensor, Tensor, Tensor]
Way = Callable[[Tensor, int], Answer]


def rest_after(logits: Tensor, best: Tensor, ids: Tensor) -> Answer:
    """The rest in one pass more, where another selection found the k best."""
    logits.scatter_(1, ids, -torch.inf)
    groups = logits.shape[1] // head.GROUP_CUDA
    _, lse = head.groups_of(logits, groups, head.GROUP_CUDA)
    over = logits[:, groups * head.GROUP_CUDA :].float()
    return best.float(), ids, torch.cat([lse, over], dim=1).logsumexp(-1)


def radix(logits: Tensor, k: int) -> Answer:
    return rest_after(logits, *logits.topk(k, dim=-1))


def flashinfer(logits: Tensor, k: int) -> Answer:
    from flashinfer import top_k

    best, ids = top_k(logits, k, sorted=True, deterministic=True)
    return rest_after(logits, best, ids.long())


def in_groups(members: int) -> Way:
    return lambda logits, k: head.one_pass(logits, k, members)


WAYS: dict[str, Way] = {
    "all: one pass, groups of 8": in_groups(8),
    "all: one pass, groups of 16": in_groups(16),
    "all: one pass, groups of 32": in_groups(32),
    "all: one pass, groups of 64": in_groups(64),
    "all: maxima, then the rest": head.top_and_rest_of,
    "all: torch.topk, then the rest": radix,
    "all: flashinfer, then the rest": flashinfer,
}
PRODUCT = "product, float32 logits"
PARTS: dict[str, Callable[..., object]] = {
    PRODUCT: lambda x: product(x["hidden"], x["weight"]),
    "product, bfloat16 logits": lambda x: x["hidden"] @ x["weight"].T,
    "copy of the logits": lambda x: x["free"].copy_(x["logits"]),
    "groups: maxima, logsumexp": lambda x: head.groups_of(
        x["logits"], x["logits"].shape[1] // head.GROUP_CUDA, head.GROUP_CUDA
    ),
    "top-k: torch.topk": lambda x: x["logits"].topk(x["k"], dim=-1),
    "top-k: groups' maxima": lambda x: head.largest(x["logits"], x["k"]),
    "top-k: flashinfer": lambda x: top_k_alone(x["logits"], x["k"]),
    "of groups: the k largest maxima": lambda x: head.largest(x["top"], x["k"], in_order=False),
    "of groups: the same by torch.topk": lambda x: x["top"].topk(x["k"], dim=-1, sorted=False),
    "of groups: the k best candidates": lambda x: x["candidates"].topk(x["k"], dim=-1),
    "of groups: logsumexp of all": lambda x: x["lse"].logsumexp(-1),
    "packing": lambda x: head.as_integers(*x["answer"], x["answer"][2]),
    "copy to the CPU": lambda x: x["out"].copy_(x["packed"], non_blocking=True),
    "step: product, answers, packing": lambda x: whole(x),
}


def top_k_alone(logits: Tensor, k: int) -> object:
    from flashinfer import top_k

    return top_k(logits, k, sorted=True, deterministic=True)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).float()


def whole(x: dict[str, object]) -> Tensor:
    best, ids, rest = head.top_and_rest(product(x["hidden"], x["weight"]), x["k"])  # type: ignore[arg-type]
    return head.as_integers(best, ids, rest, torch.logaddexp(best.logsumexp(-1), rest))


@lru_cache(1)
def make_inputs(rows: int, width: int, vocabulary: int, k: int, device: str) -> dict[str, object]:
    """Logits have a standard deviation of about 2, and a few of a row stand out, as in text."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = (2 / math.sqrt(width) * normal(vocabulary, width)).bfloat16()
    hidden = normal(rows, width).bfloat16()
    logits = product(hidden, weight)
    answer = head.top_and_rest(logits.clone(), k)
    packed = head.as_integers(*answer, answer[2])
    out = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=device == "cuda")
    free = torch.empty_like(logits)
    top, lse = head.groups_of(logits, vocabulary // head.GROUP_CUDA, head.GROUP_CUDA)
    candidates = logits[:, : k * head.GROUP_CUDA].contiguous()
    return {
        "weight": weight, "hidden": hidden, "logits": logits, "free": free,
        "answer": answer, "packed": packed, "out": out, "k": k,
        "top": top, "lse": lse, "candidates": candidates,
    }  # fmt: skip


def run_case(given: argparse.Namespace, case: str) -> Result:
    """Seconds and peak bytes of one case, and the errors of a way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = make_inputs(given.rows, given.width, given.vocabulary, given.k, device)
    if case not in WAYS:
        return measured(lambda: PARTS[case](x), given.repeats, device)
    logits, free, way = x["logits"], x["free"], WAYS[case]
    assert isinstance(logits, Tensor)
    assert isinstance(free, Tensor)

    def fresh() -> object:
        free.copy_(logits)  # ways overwrite the logits
        return way(free, given.k)

    found = measured(fresh, given.repeats, device)
    found["seconds"] -= measured(lambda: free.copy_(logits), given.repeats, device)["seconds"]
    rows = logits[: given.error_rows]
    return found | errors_of(rows, way(rows.clone(), given.k), given.k)


def errors_of(logits: Tensor, found: Answer, k: int) -> Result:
    """How many of a way's ids are not of the k largest logits, and its largest error of the rest,
    in nats."""
    best, ids, rest = found
    exact = logits.double()
    smallest = exact.topk(k, dim=-1).values[:, -1:]
    wrong = exact.gather(1, ids) < smallest
    wrong |= exact.gather(1, ids) != best.double()
    others = exact.scatter(1, ids, -torch.inf).logsumexp(-1)
    return {"wrong": int(wrong.sum()), "error": float((rest.double() - others).abs().max())}


def show(given: argparse.Namespace, runs: dict[str, list[Result]]) -> None:
    print(
        f"{given.rows:,} rows, D {given.width:,}, V {given.vocabulary:,}, k {given.k}, bfloat16; "
        f"{hardware()}"
    )
    print(f"{'':<34}{'ms':>9}{'reads':>8}{'of body':>9}{'MiB':>8}{'wrong ids':>11}{'nats':>9}")
    copy, gemm = (runs.get(name, []) for name in ("copy of the logits", PRODUCT))
    for name, found in runs.items():
        if why := failure(found):
            print(f"{name:<34}  {why}")
            continue
        best = min(found, key=lambda one: one["seconds"])
        reads = share = errors = ""
        if copy and not failure(copy):  # a copy reads and writes
            reads = f"{2 * best['seconds'] / copy[0]['seconds']:.1f}"
        if gemm and not failure(gemm):
            body = gemm[0]["seconds"] * given.body / (given.width * given.vocabulary)
            share = f"{best['seconds'] / body:.1%}"
        if "wrong" in found[0]:
            errors = f"{found[0]['wrong']:>11}{found[0]['error']:>9.1e}"
        mib = best["bytes"] / 2**20
        print(f"{name:<34}{1000 * best['seconds']:>9.3f}{reads:>8}{share:>9}{mib:>8.0f}{errors}")
    if gemm and not failure(gemm):
        rate = 2 * given.rows * given.width * given.vocabulary / gemm[0]["seconds"]
        print(f"{PRODUCT}: {rate / 1e12:.1f} TFLOP/s")


def main(words: list[str] | None = None) -> bool:
    """Returns whether a way failed or gave wrong answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64, help="positions that the head gets at once")
    parser.add_argument("--width", type=int, default=256, help="hidden size D")
    parser.add_argument("--vocabulary", type=int, default=32768, help="V")
    parser.add_argument("--k", type=int, default=64, help="entries of a distribution")
    parser.add_argument(
        "--body", type=float, default=7e9, help="parameters of a body, to compare with"
    )
    parser.add_argument("--repeats", type=int, default=20, help="steps of a case")
    parser.add_argument("--error_rows", type=int, default=64, help="rows for the errors")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="what is not done by then is left out"
    )
    given = parser.parse_args(words)
    cases = [case for case in [*PARTS, *WAYS] if "flashinfer" not in case or on_gpu()]
    runs = in_turn(cases, 1, lambda case, _: run_case(given, case), given.seconds)
    show(given, runs)
    ours = [found for case, found in runs.items() if "flashinfer" not in case]
    return any(failure(found) or found[0].get("wrong") for found in ours)


if __name__ == "__main__":
    sys.exit(main())
