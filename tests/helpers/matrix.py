"""Every family through the whole pipeline: dump with vLLM, null test, training, evaluation, and a
reload of the student in vLLM and in transformers. Writes pipeline/models/SUPPORTED.md.

    python -m tests.helpers.matrix                             # what is not measured yet
    python -m tests.helpers.matrix --again --only GPT2LMHeadModel

Each step is a script, run as a user would. To start in milliseconds, it is forked from this
process, which has imported everything and done nothing else. A family's result is a JSON file,
beside the log of its steps.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from pipeline.agreement import Answer
from pipeline.signals import die_with_parent
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.families import LEFT_OUT, SHARED, tiny_family
from tests.helpers.paths import SCRIPTS
from tests.helpers.supported import SUPPORTED, write_table

SECONDS = 240
"""Longest step. A dump takes 5 to 15 seconds."""
MAX_LENGTH = 160
TRAINING = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
}


@dataclass
class Result:
    """What was found of one architecture."""

    architecture: str
    way: str = ""
    """of the dump: plug-in or prompt_logprobs"""
    dtype: str = "float32"
    """of the dump"""
    packing: str = ""
    """own kernel, packed or one by one"""
    null_kl: float | None = None
    """nats"""
    answer: str = ""
    """of the null test"""
    steps: dict[str, int] = field(default_factory=dict)
    """exit code of each step that ran"""
    error: str = ""
    """the last message of the step that failed"""
    seconds: float = 0.0


def forked(work: Callable[[], Any], log: Path) -> int:
    """Exit code of `work` in a forked process, whose output goes to the end of `log`."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            die_with_parent(signal.SIGKILL)
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            torch.set_num_threads(1)
            inspect_here()
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with log.open("a") as file:
        file.write(f"killed after {SECONDS} seconds\n")
    return 124


def inspect_here() -> None:
    """vLLM would start a process of its own to look at a model's class."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda work: work()


def script(name: str, *arguments: str) -> Callable[[], Any]:
    def work() -> None:
        sys.argv = [str(SCRIPTS / name), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return work


class Family:
    """One architecture's way through the pipeline, in a folder of its own."""

    def __init__(self, architecture: str, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.found = Result(architecture)
        self.model, self.dump, self.run = folder / "model", folder / "dump", folder / "run"
        self.general = write_texts(folder / "general.jsonl", some_texts(24))
        self.domain = write_texts(folder / "domain.jsonl", some_texts(36)[24:])

    def measure(self) -> Result:
        began = time.monotonic()
        work: list[Callable[[], bool]] = [
            self.build, self.dump_base, self.pack, self.train, self.evaluate, self.dump_student,
        ]  # fmt: skip
        for step in work:
            if not step():
                break
        self.found.seconds = round(time.monotonic() - began, 1)
        return self.found

    def step(self, name: str, work: Callable[[], Any]) -> bool:
        """Run it and note its exit code and, where it failed, its last message."""
        self.start = self.log.stat().st_size if self.log.exists() else 0
        code = forked(work, self.log)
        self.found.steps[name] = code
        self.found.error = "" if code == 0 else last_message(self.said())
        return code == 0

    def said(self) -> str:
        """The output of the last step."""
        return self.log.read_text(errors="replace")[self.start :]

    def build(self) -> bool:
        return self.step("build", lambda: tiny_family(self.model, self.found.architecture))

    def dump_of(self, model: Path, output: Path, documents: int) -> Callable[[], Any]:
        return script(
            "dump_logits.py", f"--model={model}", f"--corpus.path={self.general}",
            f"--output={output}", "--k=16", f"--max_length={MAX_LENGTH}",
            f"--corpus.limit={documents}", f"--dtype={self.found.dtype}",
        )  # fmt: skip

    def dump_base(self) -> bool:
        good = self.step("dump", self.dump_of(self.model, self.dump, 24))
        if not good and re.search("bf16|bfloat16", self.said(), re.IGNORECASE):
            self.found.dtype = "bfloat16"
            shutil.rmtree(self.dump, ignore_errors=True)
            good = self.step("dump", self.dump_of(self.model, self.dump, 24))
        if good:
            self.found.way = "prompt_logprobs" if "prompt_logprobs" in self.said() else "plug-in"
        return good

    def pack(self) -> bool:
        answer = self.folder / "packing"

        def work() -> None:
            from pipeline.models.attention import enable_packing
            from pipeline.models.directory import ModelFolder

            model = ModelFolder.find(str(self.model)).load("float32")
            enable_packing(model)
            own = str(model.config._attn_implementation).startswith("packed")
            rows = getattr(model, "packed_own_rows", None) is not None
            answer.write_text("one by one" if rows else "own kernel" if own else "packed")

        good = self.step("pack", work)
        self.found.packing = answer.read_text() if good else ""
        return good

    def train(self) -> bool:
        arguments = [
            f"--model={self.model}", f"--domain.path={self.domain}", f"--dump={self.dump}",
            f"--output={self.run}", "--null_test.batches=4", f"--training={json.dumps(TRAINING)}",
        ]  # fmt: skip
        good = self.step("train", script("train_student.py", *arguments))
        if told := re.search(r"to the dump is ([-+.\de]+) nats .*", self.said()):
            self.found.null_kl = float(told[1])
            refused = (answer for answer in Answer if f"the answer is: {answer}" in told[0])
            self.found.answer = next(refused, Answer.SAME)
        if self.found.answer == Answer.DIFFERENT:  # measure the rest all the same
            arguments.append("--null_test.accept_different=true")
            good = self.step("train", script("train_student.py", *arguments))
        return good

    def evaluate(self) -> bool:
        models = {"base": str(self.model), "student": str(self.run / "model")}
        return self.step(
            "evaluate",
            script(
                "evaluate.py", f"--models={json.dumps(models)}", f"--domain.path={self.domain}",
                f"--general.path={self.general}", f"--max_length={MAX_LENGTH}", "--sequences=4",
            ),
        )  # fmt: skip

    def dump_student(self) -> bool:
        """vLLM reads what was saved, and transformers answers as vLLM does."""
        student, again = self.run / "model", self.folder / "again"
        if not self.step("reload in vLLM", self.dump_of(student, again, 4)):
            return False
        against = script(
            "verify_dump.py", str(again), f"--against={student}", "--sample=2",
            *["--accept-different"] * (self.found.answer == Answer.DIFFERENT),
        )  # fmt: skip
        return self.step("compare", against)


def last_message(text: str) -> str:
    """The script's own message, or that of an exception that got through, in 400 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [
        line
        for line in lines
        if re.match(r"error: |killed after|([\w.]+(Error|Exception))\b", line)
    ]
    return (told or lines or [""])[-1][:400]


def preload() -> None:
    """Import what the scripts import, so that forked processes start at once."""
    import transformers
    import vllm.v1.engine.llm_engine
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import pipeline.cli
    import pipeline.dump.dump
    import pipeline.dump.recompute
    import pipeline.evaluation.evaluate
    import pipeline.training.train  # noqa: F401

    transformers.logging.disable_progress_bar()
    gc.collect()
    gc.freeze()  # vLLM collects several times, which would look at all of this each time


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="architectures (default: all)")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--results", type=Path, default=Path("runs/models"))
    parser.add_argument("--table", action="store_true", help="write SUPPORTED.md")
    given = parser.parse_args()
    for name in set(given.only) - set(SHARED):
        parser.error(f"{name}: {LEFT_OUT.get(name, 'transformers and vLLM do not share it')}")
    given.results.mkdir(parents=True, exist_ok=True)
    preload()
    for name in given.only or SHARED:
        file = given.results / f"{name}.json"
        if file.exists() and not given.again:
            continue
        log = file.with_suffix(".log")
        log.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="family-") as folder:
            found = Family(name, Path(folder), log).measure()
        file.write_text(json.dumps(asdict(found), indent=1) + "\n")
        print(f"{name}: {found.way} {found.packing} {found.null_kl} {found.steps} {found.error}",
              flush=True)  # fmt: skip
    if given.table:
        write_table(given.results, SUPPORTED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
