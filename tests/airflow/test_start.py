"""How scripts are started and stopped, and what exit codes mean; any Python stands in for the
project's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import distill_start
import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from tests.airflow.conftest import DAGS

pytestmark = pytest.mark.usefixtures("database")

# A script that prints its process id and that of its child, and then works for a long time.
LONG = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print("numbers", os.getpid(), child.pid, flush=True)
while True:
    time.sleep(0.2)
    print("working", flush=True)
"""


@pytest.fixture(autouse=True)
def this_python(no_leftovers: None) -> None:
    os.environ["AIRFLOW_VAR_MOL_DISTILL_PYTHON"] = sys.executable


def start(code: str, **given: object) -> dict[str, object]:
    return distill_start.start(["-c", code, "{summary}"], "/", **given)  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait up to two minutes: a hang fails, a slow machine does not."""
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, f"waited two minutes for {what}"
        time.sleep(0.05)


def test_the_summary_comes_back() -> None:
    code = "import json, sys; json.dump({'tokens': 3}, open(sys.argv[1], 'w'))"
    assert start(code) == {"tokens": 3}
    assert start("print('no summary')") == {}


@pytest.mark.parametrize("code", [2, 3, 4])
def test_exit_codes_2_to_4_fail_without_a_retry(code: int) -> None:
    with pytest.raises(AirflowFailException, match="error: the plan differs"):
        start(f"import sys; print('error: the plan differs', file=sys.stderr); sys.exit({code})")


@pytest.mark.parametrize("code", [1, 75, 99])
def test_other_exit_codes_are_retried(code: int) -> None:
    with pytest.raises(AirflowException, match=f"exit code {code}") as caught:
        start(f"import sys; sys.exit({code})")
    assert type(caught.value) is AirflowException  # 99 does not mean skip


def test_a_kill_is_retried() -> None:
    with pytest.raises(AirflowException, match="killed by signal 9") as caught:
        start("import os; os.kill(os.getpid(), 9)")
    assert not isinstance(caught.value, AirflowFailException)


def test_output_goes_to_the_log_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    start("import sys; print('12/400 documents'); print('more', file=sys.stderr)")
    lines = capsys.readouterr().out.splitlines()
    assert {"12/400 documents", "more"} <= set(lines)


@pytest.mark.parametrize("value", [None, "/nowhere/python", "/etc/passwd", "/tmp"])
def test_the_interpreter_is_mandatory(value: str | None) -> None:
    del os.environ["AIRFLOW_VAR_MOL_DISTILL_PYTHON"]
    if value is not None:
        os.environ["AIRFLOW_VAR_MOL_DISTILL_PYTHON"] = value
    with pytest.raises(AirflowFailException, match="airflow variables set mol_distill_python"):
        start("print()")


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(AirflowFailException, match="/nowhere: no such directory"):
        distill_start.start(["-c", "print()"], "/nowhere")


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts a process, which calls `start` as a task runner does. All are killed
    at the end."""
    running = []

    def run(code: str, given: str = "", **env: str) -> subprocess.Popen[str]:
        text = f"import distill_start; distill_start.start(['-c', {code!r}], '/', {given})"
        process = subprocess.Popen(
            [sys.executable, "-c", text],
            env={**os.environ, "PYTHONPATH": str(DAGS), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def line_with(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(word):
            return line.strip()
    raise AssertionError(f"no line starts with {word!r}: {''.join(seen)}")


def test_the_script_dies_with_its_task(task: Callable[..., subprocess.Popen[str]]) -> None:
    process = task("import os, time; print('number', os.getpid(), flush=True); time.sleep(300)")
    script = int(line_with(process, "number").split()[1])
    assert not gone(script)
    process.kill()
    wait_for(lambda: gone(script), "the kernel to kill the script")


def test_a_timeout_ends_the_script_and_its_children(capsys: pytest.CaptureFixture[str]) -> None:
    class Timeout(BaseException):
        """Like AirflowTaskTimeout: raised by an alarm, in the middle of anything."""

    def ring(*_: object) -> None:
        raise Timeout

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(4)
    try:
        with pytest.raises(Timeout):
            start(LONG)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = capsys.readouterr().out
    numbers = next(line for line in said.splitlines() if line.startswith("numbers")).split()[1:]
    for number in numbers:
        wait_for(lambda number=number: gone(int(number)), "what the script started to end")


def test_a_killed_script_leaves_no_child(capsys: pytest.CaptureFixture[str]) -> None:
    """The child holds the log open, and would keep running."""
    code = """
import os, subprocess, sys
child = "import time; time.sleep(20); print('ended by itself', flush=True)"
print("number", subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
os.kill(os.getpid(), 9)
"""
    with pytest.raises(AirflowException, match="killed by signal 9"):
        start(code)
    said = capsys.readouterr().out
    child = next(line for line in said.splitlines() if line.startswith("number")).split()[1]
    wait_for(lambda: gone(int(child)), "the child of the script to end")
    assert "ended by itself" not in [line.strip() for line in said.splitlines()]


def test_sigterm_reaches_the_script(task: Callable[..., subprocess.Popen[str]]) -> None:
    """The script then commits and exits with 75, and Airflow retries."""
    code = """
import signal, sys, time
def stop(*_):
    print("committed", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(300)
"""
    process = task(code)
    line_with(process, "ready")
    process.terminate()
    line_with(process, "committed")
    assert "exit code 75" in line_with(process, "airflow.sdk.exceptions.AirflowException")


def test_one_writer_of_an_output_at_a_time(
    task: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    output = f"alone={str(tmp_path / 'student')!r}"
    first = task(LONG, output)
    line_with(first, "numbers")
    second = task("print('second', flush=True)", output)
    line_with(second, "waiting for")
    other = task("print('other', flush=True)", f"alone={str(tmp_path / 'another')!r}")
    line_with(other, "other")
    first.kill()
    line_with(second, "second")


def test_each_task_has_a_gpu_of_its_own(task: Callable[..., subprocess.Popen[str]]) -> None:
    gpus = f"a{os.getpid()},b c{os.getpid()}"  # names that no other process here locks
    show = "import os, time; print('mine', os.environ['CUDA_VISIBLE_DEVICES'], flush=True); "
    processes = [
        task(show + "time.sleep(300)", "gpu=True", AIRFLOW_VAR_MOL_DISTILL_GPUS=gpus)
        for _ in range(2)
    ]
    mine = [line_with(process, "mine").split()[1] for process in processes]
    assert sorted(mine) == gpus.split()
    third = task(show, "gpu=True", AIRFLOW_VAR_MOL_DISTILL_GPUS=gpus)
    line_with(third, "waiting for")
    processes[0].kill()
    assert line_with(third, "mine").split()[1] == mine[0]


def test_nothing_is_imported_from_the_folder(tmp_path: Path) -> None:
    """The folder is filled in by who triggers the run."""
    for name in ("json", "storage"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    child = "subprocess.run([sys.executable, '-c', 'import json'], check=True)"
    for code in ("import json, sys; assert '' not in sys.path", f"import subprocess, sys; {child}"):
        distill_start.start(["-c", code], str(tmp_path))


def test_scripts_do_not_see_airflows_settings(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["AIRFLOW__CORE__FERNET_KEY"] = "FERNETSECRET"
    os.environ["_AIRFLOW__SOMETHING"] = "OTHERSECRET"
    os.environ["AIRFLOW_CONN_STORE"] = "CONNECTIONSECRET"
    os.environ["AWS_PROFILE"] = "mine"
    start("import os; print(*os.environ.values(), os.environ['AWS_PROFILE'])")
    said = capsys.readouterr().out
    assert "SECRET" not in said
    assert "mine" in said


def test_the_log_shows_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dump=s3://AKIA:HIDDEN@b/d", "--training.hub_token=HIDDEN", "--c=h://x?a_sig=1&b=2"]
    distill_start.start(["-c", "print()", *words], "/")
    said = capsys.readouterr().out
    assert "HIDDEN" not in said
    assert "--dump=s3://***@b/d" in said
    assert "b=2" in said


def test_locks_belong_to_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with distill_start.hold(["gpu-0"]):
        mine = tmp_path / f"mol-distill-{os.geteuid()}"
        assert [path.name for path in mine.iterdir()] == ["gpu-0.lock"]
        assert mine.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    (tmp_path / "mol-distill-12345").mkdir()  # made by this user, not by 12345
    with pytest.raises(AirflowFailException, match=r"another user's .*Remove it"):
        distill_start.lock_folder()


def test_a_lock_is_not_made_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"mol-distill-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AirflowFailException, match=r"or link\. Remove it"):
        distill_start.lock_folder()
