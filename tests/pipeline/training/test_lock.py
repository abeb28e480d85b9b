"""One run in an output directory at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import FailedError
from pipeline.training import train
from pipeline.training.lock import LOCK, hold, turn_away
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.runs import settings

HOLDER = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, b"process 7 on elsewhere")
if os.fork() == 0:  # as a process that reads data
    os.close(1)
    time.sleep(600)
print("held", os.getpid(), flush=True)
sys.stdin.read()
"""


def test_the_second_run_is_turned_away_and_a_crash_is_not_in_the_way(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(3)])
    training = {"max_steps": 1}
    config = settings(tmp_path, model_path, None, domain, mix=0, max_length=64, training=training)
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-c", HOLDER, str(run / LOCK)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, process_group=0) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline().startswith("held")
            for start in (lambda: train.run(config), lambda: turn_away(run)):
                with pytest.raises(FailedError, match="a run is at work there"):
                    start()
            with monkeypatch.context() as ranks:
                ranks.setenv("RANK", "1")  # the first rank of its own run may be the holder
                turn_away(run)
            assert sorted(path.name for path in run.iterdir()) == [LOCK]
            holder.kill()
            holder.wait()
            train.run(config)  # the holder's child is still there
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
    assert (run / "model").is_dir()


def test_the_lock_ends_with_the_run(tmp_path: Path) -> None:
    turn_away(tmp_path / "run")  # there is none yet
    assert not (tmp_path / "run").exists()
    for _ in range(2):
        turn_away(tmp_path / "run")
        with hold(tmp_path / "run"):
            assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK).read_text()
