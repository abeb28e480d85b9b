"""A kill at any instant loses, doubles or tears no row. `make test-kill` makes 200 kills."""

import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "positions", "codec"),
    [
        (6, 1.0, "v1"),
        pytest.param(5, 0.3, "v1", marks=pytest.mark.long),
        pytest.param(12, 1.0, "v3", marks=pytest.mark.long),
    ],
)
def test_kills_leave_every_row_as_it_was(kills: int, positions: float, codec: str) -> None:
    command = [sys.executable, "-m", "tests.helpers.kills", f"--kills={kills}", "--seed=3"]
    command += [f"--positions={positions}", f"--codec={codec}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert re.search(rf"{kills} kills \(\d+ inside a step of a commit", result.stdout)
    assert "lost 0, doubled 0, torn 0" in result.stdout
