"""What the project's Triton kernels take of a GPU, without a GPU: `make gpu-compile`.

    python scripts/benchmarks/gpu_compile.py
    python scripts/benchmarks/gpu_compile.py --gpu 90

Compiles each kernel as training and stage one launch it, to machine code for A100, H100 and B200,
and prints registers per thread, bytes that spill to memory, shared memory, and the share of the
GPU's threads that fit at a time. Triton brings the compiler, ptxas. Ends with 1 if a kernel spills.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from pipeline import losses_triton
from pipeline.losses import MIN_TAIL_LOGPROB
from pipeline.teacher import head, head_triton

GPUS = {80: "A100", 90: "H100", 100: "B200"}
REGISTERS, THREADS = 65_536, 2048  # of one multiprocessor of each of them
K = 64


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants of a launch."""

    name: str
    kernel: Any
    types: dict[str, str]
    """by argument; a whole number is i32"""
    constants: dict[str, Any]
    warps: int
    odd: frozenset[str] = field(default_factory=frozenset)
    """numbers that 16 does not divide, so that no row begins at a round address"""


@dataclass(frozen=True)
class Usage:
    registers: int
    """per thread"""
    spilled: int
    """bytes per thread"""
    shared: int
    """bytes per program"""
    threads: int
    """per program"""

    @property
    def resident(self) -> float:
        """Share of the GPU's threads that its registers allow at a time."""
        granted = -(-self.registers // 8) * 8
        programs = min(REGISTERS // (granted * self.threads), THREADS // self.threads)
        return programs * self.threads / THREADS


def loss_launch(
    name: str,
    k: int,
    cap: float = 0.0,
    grad: str = "bf16",
    reverse: bool = False,
    odd: bool = False,
) -> Launch:
    """`losses_triton.step` on a large vocabulary."""
    types = dict.fromkeys(["z_ptr", "logprobs_ptr", "tail_ptr", "weights_ptr"], "*fp32")
    types |= {"grad_ptr": f"*{grad}", "ids_ptr": "*i64", "losses_ptr": "*fp32"}
    constants = {"MIN_TAIL": MIN_TAIL_LOGPROB, "REVERSE": reverse, "GRADIENT": True, "CAP": cap}
    constants |= {"ENTRIES": triton.next_power_of_2(k), "SIZE": losses_triton.BLOCK}
    if k == 1:  # as Triton does with any number that is 1
        constants["K"] = 1
    apart = frozenset({"V", "z_stride", "grad_stride"} if odd else ())
    return Launch(name, losses_triton._rows, types, constants, losses_triton.WARPS, apart)


def head_launch(name: str, dtype: str) -> Launch:
    """`head_triton.groups_of` on a large vocabulary."""
    types = {"z_ptr": f"*{dtype}", "top_ptr": "*fp32", "lse_ptr": "*fp32"}
    constants = {"MEMBERS": head.GROUP_CUDA, "SIZE": head_triton.TILE // head.GROUP_CUDA}
    return Launch(name, head_triton._groups, types, constants, head_triton.WARPS)


LAUNCHES = [
    loss_launch("cross-entropy", 1),
    loss_launch("forward KL", K),
    loss_launch("reverse KL", K, reverse=True),
    loss_launch("forward KL, soft cap", K, cap=30.0),
    loss_launch("forward KL, k = 128", 128),
    loss_launch("forward KL, float32", K, grad="fp32"),
    loss_launch("forward KL, odd vocabulary", K, odd=True),
    head_launch("head, float32 logits", "fp32"),
    head_launch("head, bfloat16 logits", "bf16"),
]


def usage(launch: Launch, gpu: int) -> Usage:
    """Compile for compute capability `gpu`, such as 90, and ask the machine code."""
    names = launch.kernel.arg_names
    types = {
        name: "constexpr" if name in launch.constants else launch.types.get(name, "i32")
        for name in names
    }
    round_ones = [
        at for at, name in enumerate(names) if types[name] != "constexpr" and name not in launch.odd
    ]
    made = compile(
        ASTSource(
            launch.kernel,
            types,
            constexprs=launch.constants,
            attrs={(at,): [["tt.divisibility", 16]] for at in round_ones},
        ),
        target=GPUTarget("cuda", gpu, 32),
        options={"num_warps": launch.warps},
    )
    found = resources(made.asm["cubin"])
    return Usage(
        found["REG"], found["STACK"] + found["LOCAL"], made.metadata.shared, 32 * launch.warps
    )


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says of a kernel: REG, STACK, LOCAL, SHARED."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


def rows(gpus: list[int]) -> Iterator[tuple[str, Usage]]:
    for launch in LAUNCHES:
        for gpu in gpus:
            found = usage(launch, gpu)
            yield (
                f"| {launch.name} | sm_{gpu} ({GPUS[gpu]}) | {found.threads} | {found.registers} | "
                f"{found.spilled} | {found.shared} | {found.resident:.0%} |",
                found,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", type=int, choices=GPUS, nargs="+", default=list(GPUS))
    given = parser.parse_args()
    print(f"Triton {triton.__version__}\n")
    print("| kernel | GPU | threads | registers | spilled bytes | shared bytes | resident |")
    print("|---|---|---|---|---|---|---|")
    spilled = 0
    for line, found in rows(given.gpu):
        print(line, flush=True)
        spilled += found.spilled
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
