"""Attention within a packed row: one kernel for all sequences, or each sequence by itself.

    python scripts/benchmarks/bench_attention.py
    python scripts/benchmarks/bench_attention.py --tokens 8192 --heads 32 --width 128

Forward and backward of one layer's attention, in bfloat16 on a GPU (the one kernel needs it) and
in float32 on a CPU, for rows of a few long and many short sequences. The error is the size of the
difference from float32, of the output and of the gradients together, as a share of their size, on
rows of --error_tokens tokens. With a sliding window, sdpa wants a T × T mask where a sequence is
longer.
"""

import argparse
import math
import sys

import torch
from processes import Result, failure, hardware, in_turn, measured, on_gpu
from torch import Tensor

from pipeline.models import varlen
from pipeline.models.packed_attention import packed_attention

ONE, EACH = "one kernel", "each by itself"


class Layer(torch.nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def make_inputs(given: argparse.Namespace, tokens: int, device: str) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    fewer = given.heads // given.groups
    return [
        torch.randn(1, tokens, heads, given.width, device=device, dtype=dtype).transpose(1, 2)
        for heads in (given.heads, fewer, fewer, given.heads)
    ]


def step(
    given: argparse.Namespace, way: str, x: list[Tensor], lengths: list[int], window: int
) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    parts = [one.detach().requires_grad_() for one in x[:3]]
    if way == ONE:
        out = varlen.attend(*parts, lengths, window or None)  # type: ignore[misc]
    else:
        fits, varlen.fits = varlen.fits, lambda *_: False
        mask = torch.tensor(window) if window else None
        out, _ = packed_attention(Layer(given.groups), *parts, mask, lengths)  # type: ignore[misc]
        varlen.fits = fits
    out.backward(x[3].transpose(1, 2))
    return [out.detach(), *(one.grad for one in parts)]  # type: ignore[list-item]


def split(tokens: int, number: int) -> list[int]:
    return [tokens // number] * number


def run_job(given: argparse.Namespace, job: str) -> Result:
    number, window, way = job.split(" ", 2)
    within = int(window)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, lengths = make_inputs(given, given.tokens, device), split(given.tokens, int(number))
    found = measured(lambda: step(given, way, x, lengths, within), given.repeats, device)
    few = max(given.error_tokens, int(number))
    x, lengths = make_inputs(given, few, device), split(few, int(number))
    exact = step(given, EACH, [one.float() for one in x], lengths, within)
    parts = zip(step(given, way, x, lengths, within), exact, strict=True)
    off = math.sqrt(sum(float((one.float() - other).square().sum()) for one, other in parts))
    return found | {"error": off / math.sqrt(sum(float(one.square().sum()) for one in exact))}


def show(given: argparse.Namespace, runs: dict[str, list[Result]]) -> None:
    print(
        f"{given.tokens:,} tokens, {given.heads} heads of {given.width}, of which {given.groups} "
        f"share keys; {hardware()}"
    )
    print(f"{'sequences':>9}{'window':>8}  {'':<16}{'ms':>9}{'MiB':>8}{'error':>10}")
    for job, found in runs.items():
        number, window, way = job.split(" ", 2)
        start = f"{number:>9}{window if window != '0' else '':>8}  {way:<16}"
        if why := failure(found):
            print(f"{start}  {why}")
            continue
        ms, mib = 1000 * found[0]["seconds"], found[0]["bytes"] / 2**20
        print(f"{start}{ms:>9.3f}{mib:>8.0f}{found[0]['error']:>10.1e}")


def main(words: list[str] | None = None) -> bool:
    """Returns whether a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the row")
    parser.add_argument("--heads", type=int, default=8, help="heads of queries")
    parser.add_argument("--groups", type=int, default=4, help="heads that share keys and values")
    parser.add_argument("--width", type=int, default=32, help="numbers of a head")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1, 2, 8, 32, 128], help="in a row, several"
    )
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[0], help="sliding windows in tokens; 0: none"
    )
    parser.add_argument("--repeats", type=int, default=20, help="steps of a case")
    parser.add_argument("--error_tokens", type=int, default=1024, help="tokens for the error")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="what is not done by then is left out"
    )
    given = parser.parse_args(words)
    ways = [ONE, EACH] if on_gpu() else [EACH]
    jobs = [
        f"{number} {window} {way}"
        for window in given.windows
        for number in given.sequences
        if window < given.tokens // number
        for way in ways
    ]
    runs = in_turn(jobs, 1, lambda job, _: run_job(given, job), given.seconds)
    show(given, runs)
    return any(map(failure, runs.values()))


if __name__ == "__main__":
    sys.exit(main())
