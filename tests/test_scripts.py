"""A forked script behaves as one that an interpreter starts."""

import signal
import time
from pathlib import Path

import pytest

from tests.helpers import scripts

SHOWS = """
import atexit, os, sys
atexit.register(print, "at exit")
print(__name__, sys.argv[1:], sys.path[0], os.getcwd(), os.environ["COLOUR"], flush=True)
print("told", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("", 0, "told\n"),
        ("sys.exit(75)", 75, "told\n"),
        ("sys.exit('no luck')", 1, "no luck\n"),
        ("raise ValueError(7)", 1, "ValueError: 7\n"),
    ],
)
def test_output_exit_code_environment_and_folder(
    tmp_path: Path, end: str, code: int, said: str
) -> None:
    file = tmp_path / "shows.py"
    file.write_text(SHOWS + end)
    (tmp_path / "elsewhere").mkdir()
    found = scripts.run(file, "--a", 7, env={"COLOUR": "red"}, cwd=tmp_path / "elsewhere")
    assert found.returncode == code
    first = f"__main__ ['--a', '7'] {tmp_path} {tmp_path / 'elsewhere'} red"
    assert found.stdout.splitlines() == [first, "at exit"]
    assert found.stderr.endswith(said)


def test_a_signal_reaches_it(tmp_path: Path) -> None:
    file = tmp_path / "waits.py"
    file.write_text("import time\nopen('begun', 'w').close()\ntime.sleep(600)\n")
    running = scripts.Script(file, cwd=tmp_path)
    try:
        while not (tmp_path / "begun").exists():
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == -signal.SIGTERM
    finally:
        running.kill()


def test_the_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    file = tmp_path / "ranks.py"
    file.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.exit(os.environ['WORLD_SIZE'] + ' ranks')\n"
        "time.sleep(600)\n"
    )
    found = scripts.run_ranks(2, file)
    assert (found.returncode, found.stderr) == (1, "2 ranks\n")


@pytest.mark.skipif(not scripts.FORKS, reason="CUDA does not survive a fork")
def test_it_has_imported_before(tmp_path: Path) -> None:
    file = tmp_path / "modules.py"
    file.write_text("import sys\nprint('pipeline.training.train' in sys.modules)\n")
    assert scripts.run(file).stdout == "True\n"
