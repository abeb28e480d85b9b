"""All benchmarks at the sizes of a GPU, within minutes: `make gpu-bench`.

    python scripts/benchmarks/gpu_bench.py --list
    python scripts/benchmarks/gpu_bench.py
    python scripts/benchmarks/gpu_bench.py --part loss

Each part has a limit of time, and leaves out what is not done by then. A part that fails does not
stop the others. All tables are printed once more at the end, and written to --output as a Markdown
page. --tiny takes sizes that a CPU does in a minute: it shows that every part works.
"""

import argparse
import contextlib
import importlib
import io
import shlex
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from processes import hardware, on_gpu


@dataclass(frozen=True)
class Part:
    module: str
    words: str
    """arguments of the benchmark"""
    tiny: str
    seconds: int
    """limit, of one GPU as fast as an H100"""
    needs: str
    packages: tuple[str, ...] = ()
    """modules of other projects without which it does not run"""


PARTS = {
    "loss": Part(
        "bench_loss",
        "--rows 8192 --width 4096 --vocabulary 151936 128256 --k 64 --dtype bfloat16",
        "--rows 64 --width 32 --vocabulary 1024 2000 --k 8 --rounds 1 --repeats 1",
        90,
        "40 GB of GPU memory; compares with liger-kernel, quack-kernels, cut-cross-entropy if "
        "installed",
    ),
    "train": Part(
        "bench_train",
        "--hidden 1280 --layers 24 --vocabulary 151936 --length 4096 --batch 1 --rows 16 "
        "--dtype bfloat16 --workers 4",
        "--hidden 64 --layers 1 --vocabulary 512 --length 64 --batch 2 --rows 8 --k 8 --steps 1 "
        "--rounds 1",
        120,
        "70 GB of GPU memory; the packages of stage two",
    ),
    "head": Part(
        "bench_head",
        "--rows 1766 --width 4096 --vocabulary 151936 --k 64",
        "--rows 8 --width 32 --vocabulary 5000 --k 8 --repeats 1",
        30,
        "10 GB of GPU memory; compares with flashinfer if installed",
    ),
    "attention": Part(
        "bench_attention",
        "--tokens 8192 --heads 32 --groups 4 --width 128 --windows 0 1024",
        "--tokens 64 --heads 2 --groups 2 --width 8 --sequences 1 4 --windows 0 9 --repeats 1 "
        "--error_tokens 16",
        30,
        "2 GB of GPU memory; transformers",
    ),
    "dump": Part(
        "bench_dump",
        "--random --shape 2048 16 151936 --documents 4000 --rounds 1 "
        "--only 'floor 1' 'floor 2' dump",
        "--random --shape 64 2 8192 --documents 4 --k 8 --rounds 1 --only 'floor 2' dump",
        600,
        "10 GB of GPU memory; vLLM, which starts three times",
        ("vllm",),
    ),
}


class Tee(io.StringIO):
    """Keeps what is written, and shows it at once."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def run(part: Part, words: list[str]) -> tuple[str, bool]:
    """(what the part printed, whether it failed)"""
    began = time.monotonic()
    with contextlib.redirect_stdout(Tee()) as shown:
        try:
            for package in part.packages:
                if find_spec(package) is None:
                    raise ModuleNotFoundError(f"No module named {package!r}")
            failed = importlib.import_module(part.module).main(words)
        except ModuleNotFoundError as error:
            failed = False
            print(f"not run: {error}")
        except SystemExit as ended:  # a process of the benchmark failed, and it stopped
            failed = True
            print(f"failed: {ended.code}")
        except Exception as error:  # the other parts still run
            failed = True
            traceback.print_exc()
            print(f"failed: {type(error).__name__}: {error}")
        print(f"({time.monotonic() - began:.0f} s)")
    return shown.getvalue(), failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the parts, and run none")
    parser.add_argument("--part", choices=PARTS, action="append", help="run this part only")
    parser.add_argument("--tiny", action="store_true", help="sizes of a CPU, to try the command")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-bench.md"), help="the page")
    given = parser.parse_args()
    parts = {name: part for name, part in PARTS.items() if name in (given.part or PARTS)}
    why_not = None if given.tiny or on_gpu() else "no CUDA device"
    for name, part in parts.items():
        print(f"{name:<10}at most {part.seconds} s; {part.needs}")
        print(f"          python scripts/benchmarks/{part.module}.py {part.words}")
    if given.list or why_not:
        print("nothing was run" + (f": {why_not}" if why_not else ""))
        return
    pages, failed = [f"# gpu-bench\n\n{hardware()}\n"], False
    for name, part in parts.items():
        print(f"\n== {name}", flush=True)
        words = shlex.split(part.tiny if given.tiny else part.words)
        shown, broken = run(part, [*words, "--seconds", str(part.seconds)])
        pages.append(f"## {name}\n\n`{part.module}.py {shlex.join(words)}`\n\n```\n{shown}```\n")
        failed |= broken
    page = "\n".join(pages)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(page, encoding="utf-8")
    print(f"\n{page}\nwritten to {given.output}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
