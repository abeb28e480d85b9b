"""The scripts as users start them, in processes that begin at once.

A script's process spends about 6 s of CPU on importing torch, transformers and peft. Here it is
forked from multiprocessing's fork server, which has imported them and done nothing else.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.helpers.paths import SCRIPTS

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "pipeline.dump.dump",
        "pipeline.dump.recompute",
        "pipeline.evaluation.evaluate",
        "pipeline.study.study",
        "pipeline.training.train",
        "storage.codec.v3_kernels",
    ]
)


class Script:
    """A script of the project that runs, with the methods of subprocess.Popen that tests use.

    Its environment is this process's, with the changes of `env`; its folder is this process's, or
    `cwd`.
    """

    def __init__(
        self,
        name: str | Path,
        *words: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """`name` is that of a file below scripts/, or a path."""
        self.command = [str(SCRIPTS / name), *map(str, words)]
        self.folder = tempfile.TemporaryDirectory(prefix="script-")
        environment = {**os.environ, **(env or {})}
        given = (self.command, Path(self.folder.name), environment, cwd or Path.cwd())
        self.process = SERVER.Process(target=become, args=given)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout or 0)
        return self.process.exitcode

    def done(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """What it wrote and its exit code, when it has ended."""
        code = self.wait(timeout)
        texts = [Path(self.folder.name, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.command, code, *texts)


def run(
    name: str | Path, *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    return Script(name, *words, env=env, cwd=cwd).done()


def run_ranks(ranks: int, name: str | Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes, with the variables and the store that torchrun gives them.

    The exit code is that of the first rank that fails; the others are then ended.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    started = [
        Script(name, *words, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    failed = 0
    while running := [script for script in started if script.poll() is None]:
        multiprocessing.connection.wait([script.process.sentinel for script in running])
        failed = failed or next((script.poll() or 0 for script in started if script.poll()), 0)
        for script in started if failed else []:
            script.kill()
    failed = failed or next((script.poll() or 0 for script in started if script.poll()), 0)
    found = [script.done() for script in started]
    texts = ["".join(getattr(one, name) for one in found) for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(started[0].command, failed, *texts)


def become(command: list[str], output: Path, environment: dict[str, str], cwd: Path) -> None:
    """Make this process that of a script; it ends with the script's exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), stream)
    end(lambda: run_main(*command))


def run_main(file: str, *words: str) -> None:
    """Run a file in this process as the interpreter does."""
    sys.argv = [file, *words]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")


def end(work: Callable[[], Any]) -> None:
    """Do the work, then end this process with its exit code, as the interpreter does."""
    code = 0
    try:
        work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
