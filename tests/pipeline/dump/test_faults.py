"""Faults from outside: full disks, read-only and moved directories, signals, a parent that dies.

Each gives a message and an exit code. Committed shards stay, and the same command resumes.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.dump import dump
from pipeline.dump.partitions import PartitionsWriter
from pipeline.dump.threads import Behind, ahead
from pipeline.errors import Interrupted
from storage import LogitDataset, PlanMismatch, StoreError, verify
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import SCRIPT, rows, settings

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="mounting needs root")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "corpus.jsonl", some_texts(60))


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@needs_root
def test_a_full_disk_stops_a_dump_which_resumes_with_more_space(
    tmp_path: Path, model_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump.run(settings(tmp_path, model_path, corpus))
    with tmpfs(tmp_path / "small", "200k") as disk:
        config = settings(tmp_path, model_path, corpus, output=str(disk / "dump"))
        assert cli.main(lambda: dump.run(config), None) == 1
        message = capsys.readouterr().err
        assert "the disk is full" in message
        assert "run the same command again" in message
        report = verify(config.output, partial=True)
        assert report.ok, report.faults
        committed = len(LogitDataset(config.output, partial=True))
        assert committed > 0
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        dump.run(config)
        assert verify(config.output).ok
        assert rows(config.output) == rows(tmp_path / "dump")


@needs_root
def test_a_read_only_directory_is_named_in_the_error(
    tmp_path: Path, model_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tmpfs(tmp_path / "disk", "4m") as disk:
        config = settings(tmp_path, model_path, corpus, output=str(disk / "dump"))
        dump.run(config, only="plan")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert cli.main(lambda: dump.run(config), None) == 1
        assert "read-only" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert dump.run(config)["finished"]


def test_a_directory_that_is_moved_away_is_not_made_again(
    tmp_path: Path, model_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved away in mid-run, no half dump appears in its place. Moved back, it resumes."""
    dump.run(settings(tmp_path, model_path, corpus))
    config = settings(tmp_path, model_path, corpus, output=str(tmp_path / "moved"))
    commit = PartitionsWriter.commit

    def then_move(writer: PartitionsWriter) -> None:
        commit(writer)
        writer.settle()
        if writer.index == 3:
            os.rename(tmp_path / "moved", tmp_path / "elsewhere")

    monkeypatch.setattr(PartitionsWriter, "commit", then_move)
    with pytest.raises(StoreError, match="is gone"):
        dump.run(config)
    assert not (tmp_path / "moved").exists()
    monkeypatch.undo()
    os.rename(tmp_path / "elsewhere", tmp_path / "moved")
    dump.run(config)
    assert rows(config.output) == rows(tmp_path / "dump")


def test_a_directory_that_another_dump_took_gets_no_shard_of_this_one(
    tmp_path: Path, model_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, model_path, corpus)
    commit = PartitionsWriter.commit

    def then_replace(writer: PartitionsWriter) -> None:
        commit(writer)
        writer.settle()
        if writer.index == 2:
            os.rename(tmp_path / "dump", tmp_path / "old")
            dump.run(settings(tmp_path, model_path, corpus, k=4), only="plan")

    monkeypatch.setattr(PartitionsWriter, "commit", then_replace)
    monkeypatch.setattr(dump, "stop_on_signals", lambda limit: contextlib.nullcontext())
    with pytest.raises(PlanMismatch, match="another plan"):
        dump.run(config)
    assert not list((tmp_path / "dump").rglob("*.parquet"))


def test_resume_after_shards_of_another_size(
    tmp_path: Path, model_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second writer ends its shards at other documents: no row is lost or doubled."""
    dump.run(settings(tmp_path, model_path, corpus))
    config = settings(tmp_path, model_path, corpus, output=str(tmp_path / "two"))
    other_cut = PartitionsWriter.__init__
    commit = PartitionsWriter.commit
    ran = []

    def first_let_the_other(writer: PartitionsWriter) -> None:
        if writer.index == 2 and not ran:
            ran.append(True)
            monkeypatch.setattr(PartitionsWriter, "__init__", short_shards)
            with pytest.raises(Interrupted):
                dump.run(config)
            monkeypatch.setattr(PartitionsWriter, "__init__", other_cut)
        commit(writer)
        writer.settle()
        if len(ran) == 1 and writer.config.shard_tokens == 120 and writer.index == 5:
            ran.append(True)
            raise Interrupted("the other writer ends here")

    def short_shards(writer, config, spans, meter) -> None:  # type: ignore[no-untyped-def]
        other_cut(writer, replace(config, shard_tokens=120), spans, meter)

    monkeypatch.setattr(PartitionsWriter, "commit", first_let_the_other)
    monkeypatch.setattr(dump, "stop_on_signals", lambda limit: contextlib.nullcontext())
    dump.run(config)
    assert len(ran) == 2
    assert rows(config.output) == rows(tmp_path / "dump")
    assert verify(config.output).ok


def command(tmp_path: Path, model_path: Path, corpus: Path) -> list[str]:
    given = [f"--model={model_path}", f"--corpus.path={corpus}", f"--output={tmp_path / 'dump'}"]
    return [sys.executable, str(SCRIPT), *given, "--k=8", "--shard_tokens=500"]


def wait_for(path: Path, pattern: str, number: int = 1) -> None:
    deadline = time.monotonic() + 120
    while len(list(path.glob(pattern))) < number:
        assert time.monotonic() < deadline, f"no {pattern} in {path}"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_dump_ends_with_the_process_that_started_it(
    tmp_path: Path, model_path: Path, corpus: Path
) -> None:
    """The parent is killed. The dump stops by itself and leaves no open shard."""
    write_texts(corpus, some_texts(3000))
    words = [*command(tmp_path, model_path, corpus), "--engine=transformers"]
    # Under nohup, SIGHUP is ignored and a dump outlives its parent. Restore SIGHUP, as these tests
    # may run under nohup.
    code = (
        "import signal, subprocess; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        f"p = subprocess.Popen({words!r}); print(p.pid, flush=True); p.wait()"
    )
    log = (tmp_path / "log").open("w")
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        wait_for(tmp_path / "dump", "00000/00001.json")
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 60
        while Path(f"/proc/{child}").exists() and state_of(child) != "Z":
            assert time.monotonic() < deadline, "the dump lives on"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert "stopped by SIGTERM" in (tmp_path / "log").read_text()
    assert not list((tmp_path / "dump").rglob(".writing-*"))
    assert verify(tmp_path / "dump", partial=True).ok


def state_of(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return "Z"


def test_reading_ahead_is_bounded_and_its_exception_arrives() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number
        raise ValueError("the corpus broke")

    with ahead(numbers(), 5) as source:
        assert next(source) == 0
        time.sleep(0.3)
        assert len(made) <= 8
        with pytest.raises(ValueError, match="the corpus broke"):
            list(source)
    with ahead(numbers(), 5) as source:
        next(source)
    time.sleep(0.3)
    after = len(made)
    time.sleep(0.3)
    assert len(made) == after, "the thread still reads after its consumer has left"


def test_writing_behind_is_bounded_and_its_exception_arrives() -> None:
    done: list[int] = []

    def slow(number: int) -> None:
        time.sleep(0.02)
        done.append(number)

    with Behind(slow, limit=10) as behind:
        for number in range(20):
            behind.put(number, 5)
            assert number - len(done) <= 3, "more waits than the limit allows"
    assert done == list(range(20))

    def broken(number: int) -> None:
        raise OSError(f"no room for {number}")

    def put(work: Callable[[int], None], numbers: range, weight: int, limit: int) -> None:
        with Behind(work, limit) as behind:
            for number in numbers:
                behind.put(number, weight)
            if work is slow:
                raise KeyError

    with pytest.raises(OSError, match="no room for 0"):
        put(broken, range(20), 5, 10)
    with pytest.raises(OSError, match="no room for 0"):  # after the last put
        put(broken, range(1), 5, 10)
    with pytest.raises(KeyError):
        put(slow, range(100, 200), 1, 1000)
    assert len([number for number in done if number >= 100]) < 100, "what waited was not dropped"
