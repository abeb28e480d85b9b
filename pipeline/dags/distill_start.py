"""Run one of the project's scripts in a task, and turn its exit code into Airflow's outcome."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from airflow.sdk import Variable
from airflow.sdk.exceptions import AirflowException, AirflowFailException

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]

# Exit codes of the scripts (pipeline/errors.py). A retry cannot fix the first three. It resumes
# after the last one, and after any other failure, such as a crash or a kill.
NO_RETRY = {2: "bad input", 3: "refused", 4: "damaged data"}
INTERRUPTED = 75
AIRFLOWS = ("AIRFLOW_", "_AIRFLOW_")
GRACE = 60  # seconds that a script has, after SIGTERM, to commit what it can


def interpreter() -> str:
    """The project's Python, from the mandatory Variable `mol_distill_python`."""
    path = Variable.get("mol_distill_python", default=None)
    how = (
        "It names the Python of the project's environment on the machine that runs the task, such "
        "as /opt/mol-distill/.venv/bin/python. Set it with `airflow variables set "
        "mol_distill_python PATH`, or in the environment as AIRFLOW_VAR_MOL_DISTILL_PYTHON."
    )
    if not path:
        raise AirflowFailException(f"the Airflow Variable mol_distill_python is not set. {how}")
    if not os.access(path, os.X_OK) or os.path.isdir(path):
        raise AirflowFailException(
            f"mol_distill_python: {path!r} is not an executable file on this machine. {how}"
        )
    return str(path)


def lock_folder() -> Path:
    """This user's own folder of locks on this machine: another user's are not in the way.

    Raises AirflowFailException where something else has its name.
    """
    folder = Path(tempfile.gettempdir(), f"mol-distill-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise AirflowFailException(
            f"{folder}: expected this user's own directory for locks, found another user's file, "
            "directory or link. Remove it"
        )
    return folder


@contextlib.contextmanager
def hold(names: list[str]) -> Iterator[str]:
    """Hold the first free lock of `names` on this machine, and yield its name; wait for a free one.

    The task's process holds the lock. So an orphan of an earlier try keeps what its script still
    uses.
    """
    folder = lock_folder()
    while True:
        for name in names:
            flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(folder / f"{name}.lock", flags, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            try:
                yield name
            finally:
                os.close(file)
            return
        print(f"waiting for {' or '.join(names)}: another process holds it", flush=True)
        time.sleep(5)


def start(arguments: list[str], folder: str, gpu: bool = False, alone: str | None = None) -> Json:
    """Run `python ARGUMENTS` in `folder`, with its output in the task's log.

    The folder holds what a user put there, so no module is imported from it (-P), and the script
    does not see Airflow's own settings, which hold its keys and the password of its database.

    `{summary}` in the arguments becomes the path of a temporary file; returns the JSON that the
    script wrote there. With `gpu` the script gets one of the GPUs that the Variable
    `mol_distill_gpus` lists. `alone` is a path on this machine that no other task may write at the
    same time. Raises AirflowFailException if a retry would fail in the same way, otherwise
    AirflowException.
    """
    where = ROOT / folder
    if not where.is_dir():
        raise AirflowFailException(f"folder {where}: no such directory on this machine")
    python = interpreter()
    env = {name: value for name, value in os.environ.items() if not name.startswith(AIRFLOWS)}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    last: deque[str] = deque(maxlen=20)
    with (
        contextlib.ExitStack() as held,
        tempfile.TemporaryDirectory(prefix="mol-distill-") as scratch,
    ):
        if alone is not None:
            digest = hashlib.sha256(str(where / alone).encode()).hexdigest()[:16]
            held.enter_context(hold([f"output-{digest}"]))
        gpus = Variable.get("mol_distill_gpus", default="").split() if gpu else []
        if gpus:
            name = held.enter_context(hold([f"gpu-{ids}" for ids in gpus]))
            env["CUDA_VISIBLE_DEVICES"] = name.removeprefix("gpu-")
        summary = Path(scratch, "summary.json")
        shown = [argument.replace("{summary}", str(summary)) for argument in arguments]
        print(f"in {where}: {python} {without_secrets(' '.join(shown))}", flush=True)
        # The script always ends with this task: by SIGTERM if there is time, otherwise the kernel
        # kills it.
        script = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", python, "-P", *shown],
            cwd=where,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=clear_up, args=[script.pid], daemon=True).start()
        before = signal.signal(signal.SIGTERM, lambda *_: script.terminate())
        try:
            assert script.stdout is not None
            for line in script.stdout:
                print(line, end="", flush=True)
                last.append(line.strip())
            code = script.wait()
        finally:
            end(script)
            signal.signal(signal.SIGTERM, before)
        if code == 0:
            found: Json = json.loads(summary.read_text()) if summary.exists() else {}
            return found
    raise failure(code, last)


def without_secrets(command: str) -> str:
    """A command as the log may show it. The form takes no secrets, but not all come through it."""
    command = re.sub(r"(?<=://)[^/\s@'\"]*@", "***@", command)
    names = r"[\w.-]*(?:token|key|secret|password|signature|credential)"
    return re.sub(rf"({names}=)[^\s&]+", r"\1***", command, flags=re.IGNORECASE)


def clear_up(pid: int) -> None:
    """After the script has ended, kill its remaining processes.

    An engine without its script would keep the GPU and the open log. The script is not reaped here,
    so no other process can have its id.
    """
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.killpg(pid, signal.SIGKILL)


def end(script: "subprocess.Popen[str]") -> None:
    """Stop a script that still runs, and all processes that it started."""
    if script.poll() is None:
        script.terminate()
        try:
            script.wait(GRACE)
        except subprocess.TimeoutExpired:
            print(f"the script did not stop within {GRACE} s; killing it", flush=True)
    with contextlib.suppress(ProcessLookupError):  # no process of its session is left
        os.killpg(script.pid, signal.SIGKILL)
    script.wait()


def failure(code: int, last: deque[str]) -> AirflowException:
    """The exception with the script's own message; its type decides whether Airflow retries."""
    said = [line for line in last if line.startswith(("error:", "FAULT"))] or list(last)[-1:]
    message = "; ".join(said)
    if code in NO_RETRY:
        return AirflowFailException(f"{NO_RETRY[code]} (exit code {code}): {message}")
    if code == INTERRUPTED:
        return AirflowException(f"interrupted (exit code {code}), a retry resumes: {message}")
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return AirflowException(f"the script failed ({how}): {message}")
