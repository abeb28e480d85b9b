"""Work in several processes: in order, ended early, and with a process that dies."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from storage import StoreError
from storage.parallel import AHEAD, in_order

BEGIN = """
import os, signal, sys, time
from pathlib import Path
from storage.parallel import in_order

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of the background

def work(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

list(in_order(work, range(4), 2))
"""


def test_results_come_in_order() -> None:
    numbers = list(range(30))
    assert list(in_order(lambda n: (n, os.getpid()), numbers, 1)) == [
        (n, os.getpid()) for n in numbers
    ]
    found = list(in_order(lambda n: (n, os.getpid()), numbers, 3))
    assert [number for number, _ in found] == numbers
    assert os.getpid() not in {process for _, process in found}
    assert list(in_order(str, [], 3)) == []


def test_errors_of_the_work_are_its_own() -> None:
    def failing(number: int) -> int:
        if number == 5:
            raise StoreError("number 5")
        return number

    results = in_order(failing, range(9), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(StoreError, match="number 5"):
        next(results)
    assert not active_children()


def test_a_process_that_dies_is_an_error() -> None:
    def dying(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(StoreError, match=r"one of 2 processes died: .* fewer --jobs"):
        list(in_order(dying, range(9), 2))
    assert not active_children()


def test_it_stays_a_little_ahead(tmp_path: Path) -> None:
    """Results that nobody takes do not fill the memory."""
    results = in_order(lambda n: (tmp_path / str(n)).touch(), range(1000), 2)
    with contextlib.closing(results):
        for _ in range(10):
            next(results)
        assert len(list(tmp_path.iterdir())) <= 10 + 2 * AHEAD
    assert not active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_first(tmp_path: Path, number: int) -> None:
    """A Ctrl-C reaches all of them, a kill the first alone."""
    first = subprocess.Popen(
        [sys.executable, "-c", BEGIN, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    others = wait_for(lambda: [int(file.name) for file in tmp_path.iterdir()], 2)
    for process in [first.pid, *(others if number == signal.SIGINT else [])]:
        os.kill(process, number)
    assert first.wait(timeout=60) == -number
    assert first.stderr is not None
    assert first.stderr.read().count("KeyboardInterrupt") == (number == signal.SIGINT)
    wait_for(lambda: [one for one in others if not runs(one)], 2)


def runs(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(look, number: int) -> list[int]:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 120
    while len(found := look()) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return list(found)
