"""The runner of the checks on a GPU, with small checks of its own that need none."""

import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import __main__ as gpu_check
from tests.gpu.measured import Measured, Number
from tests.gpu.page import page
from tests.gpu.runner import Check, Runner
from tests.helpers.paths import ROOT

CONFTEST = "from tests.gpu.conftest import *\n"
GOOD = '''
import pytest

def test_right(measured):
    """The number is near one."""
    measured("number", 1.01, 1.1, least=0.9, unit="nats")

@pytest.mark.gpu(devices=9, package="of_nobody")
def test_lacking(measured):
    """Needs more than there is."""
'''
BAD = """
import os, time, pytest

def test_wrong(measured):
    measured("first | number", 2.0, 1.0)
    measured("second", 0.5, 1.0)

def test_not_a_number(measured):
    measured("loss", float("nan"), 1.0)

def test_raises():
    raise ValueError("expected 3 rows\\nfound 2")

def test_ends_its_process():
    os._exit(9)

@pytest.mark.gpu(seconds=1)
def test_hangs():
    time.sleep(600)

def test_after_them(measured):
    measured("still here", 1, least=1)
"""


def checks_in(folder: Path, **files: str) -> Runner:
    """A runner of fake checks, which need no device: as in a rehearsal."""
    inside = folder / "checks"
    inside.mkdir()
    (inside / "conftest.py").write_text(CONFTEST)
    for name, text in files.items():
        (inside / f"test_{name}.py").write_text(
            "import pytest\npytestmark = pytest.mark.gpu\n" + text
        )
    return Runner("checks", folder)


def run(folder: Path, *arguments: str, **files: str) -> tuple[int, str]:
    """(exit code, page)"""
    page = folder / "page.md"
    given = ["--rehearse", "--processes", "1", "--page", str(page), *arguments]
    code = gpu_check.main(given, checks_in(folder, **files))
    return code, page.read_text() if page.exists() else ""


def row(text: str, check: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {check} ")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_page_of_checks_that_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(tmp_path, good=GOOD)
    assert code == 0
    _, result, measured, seconds = row(text, "good: right")
    assert (result, measured) == ("passed", "number 1.01 nats (≥ 0.9 and ≤ 1.1)")
    assert float(seconds) >= 0
    assert row(text, "good: lacking")[1:3] == ["not run", "of_nobody is not installed"]
    assert "1 passed, 0 failed, 1 not run" in text
    assert row(text, "torch")[1] == __import__("torch").__version__
    said = capsys.readouterr()
    assert said.out == text
    assert "2/2 good: right: passed" in said.err


def test_no_check_hides_another(tmp_path: Path) -> None:
    """One that fails, dies or hangs costs itself alone, and its page says how it ended."""
    code, text = run(tmp_path, bad=BAD, good=GOOD)
    assert code == 1
    _, result, measured, _ = row(text, "bad: wrong")
    assert result == "**failed**"
    assert "**first \\| number 2 (≤ 1)**" in measured
    assert "; second 0.5 (≤ 1)" in measured
    assert "**loss nan (≤ 1)**" in row(text, "bad: not a number")[2]
    assert row(text, "bad: raises")[2] == "ValueError: expected 3 rows"
    assert "its process ended with code 9" in row(text, "bad: ends its process")[2]
    assert "its process stopped after 1 s" in row(text, "bad: hangs")[2]
    assert row(text, "bad: after them")[1:3] == ["passed", "still here 1 (≥ 1)"]
    assert row(text, "good: right")[1] == "passed"
    assert "2 passed, 5 failed, 1 not run" in text


BROKEN = """
import os
from pathlib import Path

@pytest.fixture(autouse=True)
def process(request):
    Path(request.node.name).write_text(str(os.getpid()))

def test_first(measured):
    measured("number", 1, 1)

def test_breaks_cuda(measured):
    measured("number", 2, 1)

def test_after_it(measured):
    measured("number", 1, 1)
"""


def test_no_check_runs_where_cuda_is_broken(tmp_path: Path) -> None:
    """An illegal address ends CUDA for a whole process: what follows runs in another one."""
    runner = checks_in(tmp_path, broken=BROKEN)
    said = "import tests.gpu.conftest\ntests.gpu.conftest.broken = lambda: True\n"
    (tmp_path / "checks" / "conftest.py").write_text(CONFTEST + said)
    page = tmp_path / "page.md"
    given = ["--rehearse", "--processes", "1", "--page", str(page)]
    assert gpu_check.main(given, runner) == 1
    names = ["first", "breaks cuda", "after it"]
    results = [row(page.read_text(), f"broken: {name}")[1] for name in names]
    assert results == ["passed", "**failed**", "passed"]
    pids = [(tmp_path / f"test_{name.replace(' ', '_')}").read_text() for name in names]
    assert pids[0] == pids[1] != pids[2]


def test_the_longest_begins_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = "\n\n@pytest.mark.gpu(seconds={})\ndef test_it():\n    pass\n"
    limits = {"a": 20, "b": 90, "c": 50}
    run(tmp_path, **{name: check.format(seconds) for name, seconds in limits.items()})
    order = re.findall(r"/3 (\w): it: passed", capsys.readouterr().err)
    assert order == ["b", "c", "a"]


def test_a_list_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--list", bad=BAD, good=GOOD) == (0, "")
    said = capsys.readouterr().out
    assert row(said, "good: right")[1:] == ["The number is near one.", "1 GPU", "can run here"]
    assert row(said, "good: lacking")[2:] == ["9 GPUs, of_nobody", "of_nobody is not installed"]
    assert "bad: hangs" in said


def test_only_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(tmp_path, "--only", "after them", bad=BAD)
    assert code == 0
    assert "1 passed, 0 failed, 0 not run" in text
    assert run(tmp_path / "checks", "--only", "misspelt", bad=BAD)[0] == 2
    assert "misspelt: no check has this in its name" in capsys.readouterr().err


def test_what_has_no_time_left_is_no_success(tmp_path: Path) -> None:
    code, text = run(tmp_path, "--minutes", "0", good=GOOD)
    assert code == 1
    assert row(text, "good: right")[1:3] == ["not run", "no time was left"]


INTERRUPTED = """
import signal, sys
from pathlib import Path
from tests.gpu.__main__ import main
from tests.gpu.runner import Runner

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
folder = Path(sys.argv[1])
arguments = ["--rehearse", "--processes", "1", "--page", str(folder / "page.md")]
sys.exit(main(arguments, Runner("checks", folder)))
"""
WAITS = """
import os, time
from pathlib import Path

def test_first(measured):
    measured("number", 1, 1)

def test_waits():
    Path("begun.part").write_text(str(os.getpid()))
    Path("begun.part").rename("begun")
    time.sleep(600)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_check_leaves_a_page_and_no_process(
    tmp_path: Path, sent: signal.Signals
) -> None:
    checks_in(tmp_path, waits=WAITS)
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        give_up = time.monotonic() + 120
        while not (tmp_path / "begun").exists():
            assert running.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        running.send_signal(sent)
        running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 75
    text = (tmp_path / "page.md").read_text()
    assert row(text, "waits: first")[1] == "passed"
    assert row(text, "waits: waits")[1] == "not run"
    assert not Path(f"/proc/{(tmp_path / 'begun').read_text()}").exists()


def test_nothing_to_run_is_no_success() -> None:
    lacking = Check("test_a.py::test_b", "", 1, None, 9, "no CUDA device")
    lacking.end("skipped", "no CUDA device")
    assert gpu_check.exit_code([lacking]) == 2
    assert "| a: b | not run | no CUDA device |" in page([lacking], 1, False)


@pytest.mark.parametrize(
    ("value", "most", "least", "right"),
    [
        (1, 1, None, True),
        (1.1, 1, None, False),
        (1, None, 1, True),
        (0.9, 2, 1, False),
        (9, None, None, True),
        (math.nan, 1, None, False),
        (math.nan, None, 1, False),
    ],
)
def test_bounds(value: float, most: float | None, least: float | None, right: bool) -> None:
    assert Number("n", value, most, least, "").right == right
    measured = Measured()
    measured("n", value, most, least=least)
    if right:
        measured.check()
    else:
        with pytest.raises(AssertionError, match="out of bounds: n"):
            measured.check()


@pytest.mark.slow
def test_the_checks_are_there_and_say_what_they_show() -> None:
    command = [sys.executable, "-m", "tests.gpu", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    subjects = {cells[0].removeprefix("| ").partition(":")[0] for cells in rows}
    expected = {file.stem for file in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert subjects == {name.removeprefix("test_").replace("_", " ") for name in expected}
    assert not [cells[0] for cells in rows if not cells[1].strip()], "no docstring"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_that_a_cpu_can_rehearse_passes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    arguments = ["--rehearse", "--minutes", "30", "--page", str(page)]
    assert gpu_check.main(arguments) == 0, page.read_text()
