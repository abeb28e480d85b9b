"""A cached file that a process uses is known to be used, until that process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cache_use
from pipeline.cache_use import unused, use
from tests.helpers.paths import ROOT

USER = """
import sys
from pathlib import Path
from pipeline.cache_use import use
print(use(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_use, "HELD", {})


def is_unused(path: Path) -> bool:
    with unused(path) as free:
        return free


def test_another_process_is_seen_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a")
    assert is_unused(path)
    user = subprocess.Popen(
        [sys.executable, "-c", USER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == b"True\n"
    assert not is_unused(path)
    user.kill()
    user.communicate()
    assert is_unused(path)


def test_this_process_is_seen_too_and_opens_a_file_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a")
    os.utime(path, (1, 1))
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert use(path)
    assert len(os.listdir("/proc/self/fd")) == files + 1
    assert not is_unused(path)
    assert path.stat().st_mtime > 1
    path.unlink()
    path.write_bytes(b"another file")
    assert is_unused(path)
    assert use(path)
    assert not is_unused(path)


def test_a_corpus_of_many_files_leaves_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_use, "MOST_HELD", 3)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        path = tmp_path / str(number)
        path.write_bytes(b"a")
        os.utime(path, (1, 1))
        assert use(path)
        assert path.stat().st_mtime > 1
    assert len(os.listdir("/proc/self/fd")) == before + 3


def test_what_goes_away_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert not use(path)
    assert is_unused(path)
    path.write_bytes(b"a")
    with unused(path) as free:
        assert free
        assert not use(path)
    assert use(path)


def test_without_locks_a_file_is_used_and_never_known_to_be_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    path = tmp_path / "a"
    path.write_bytes(b"a")
    monkeypatch.setattr(cache_use.fcntl, "flock", none)
    assert use(path)
    with unused(path, none) as free:
        assert not free
    assert len(cache_use.HELD) == 1
