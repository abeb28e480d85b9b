"""The ranks of one host: where hosts meet, what exit codes become, and that no rank is left."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, FailedError, Interrupted, RefusedError
from pipeline.training import hosts
from storage import StorageError
from tests.helpers.paths import ROOT, SCRIPTS
from tests.helpers.s3 import free_port


@pytest.mark.parametrize(
    ("count", "host", "endpoint", "named"),
    [
        (2, 2, "node0:29500", "--host 2"),
        (2, -1, "node0:29500", "--host -1"),
        (0, 0, "node0:29500", "--host 0"),
        (2, 0, "node0", "--endpoint node0"),
        (2, 0, ":29500", "--endpoint :29500"),
        (2, 0, "node0:0", "--endpoint node0:0"),
        (2, 0, "node0:65536", "--endpoint node0:65536"),
        (2, 0, "node0:x", "--endpoint node0:x"),
    ],
)
def test_a_meeting_that_cannot_be(count: int, host: int, endpoint: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        hosts.Meeting(count, host, endpoint)


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        ({0: 1, 1: 2}, ConfigError),
        ({0: -15, 1: 3}, RefusedError),
        ({0: 4, 1: 75}, StorageError),
        ({0: 75, 1: 1}, Interrupted),
        ({0: 1, 1: -9}, FailedError),
    ],
)
def test_what_a_rank_says_counts_before_those_that_it_left(
    codes: dict[int, int], kind: type[Exception]
) -> None:
    assert type(hosts.verdict(codes)) is kind


def test_a_verdict_names_the_ranks() -> None:
    said = "rank 0 ended with 1; rank 3 was killed by signal 9"
    assert str(hosts.verdict({3: -9, 0: 1})) == said


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """A function that runs train_hosts.py on one host, with this code as train_student.py."""
    endpoint = f"localhost:{free_port()}"

    def run(code: str, host: int = 0, hosts: int = 1) -> subprocess.Popen[str]:
        (tmp_path / "train_hosts.py").write_text((SCRIPTS / "train_hosts.py").read_text())
        (tmp_path / "train_student.py").write_text(code)
        where = [f"--hosts={hosts}", f"--host={host}", f"--endpoint={endpoint}"]
        return subprocess.Popen(
            [sys.executable, tmp_path / "train_hosts.py", *where, "--", "--output", "student"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def test_the_script_gets_its_arguments_and_its_code_comes_back(start: Start) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['WORLD_SIZE']); sys.exit(3)"
    process = start(code)
    out, err = process.communicate()
    assert "['--output', 'student'] 1" in out
    assert "error: rank 0 ended with 3" in err
    assert process.returncode == 3


def test_two_hosts_meet(start: Start) -> None:
    """One rank is killed, and the other one fails, as when its peer is gone."""
    code = """
import os, sys
print(os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), 9)
sys.exit(1)
"""
    both = [start(code, host, 2) for host in (0, 1)]
    said = [process.communicate() for process in both]
    assert sorted(out for out, _ in said) == ["0 of 2\n", "1 of 2\n"]
    killed = next(at for at, (out, _) in enumerate(said) if out.startswith("1"))
    assert "error: rank 1 was killed by signal 9" in said[killed][1]
    assert "error: rank 0 ended with 1" in said[1 - killed][1]
    assert [process.returncode for process in both] == [1, 1]


SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"


def test_ranks_die_with_the_agent(start: Start) -> None:
    process = start(SLEEP)
    assert process.stdout is not None
    rank = os.pidfd_open(int(process.stdout.readline()))
    process.kill()
    ended, _, _ = select.select([rank], [], [], 60)
    if not ended:
        signal.pidfd_send_signal(rank, signal.SIGKILL)
    process.communicate()
    os.close(rank)
    assert ended, "a rank outlived the agent that was killed"


def test_a_signal_reaches_the_ranks(start: Start) -> None:
    process = start(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True); time.sleep(300)"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    out, err = process.communicate()
    assert out == "saved\n"
    assert "error: stopped by SIGTERM; run the same command again" in err
    assert process.returncode == 75
