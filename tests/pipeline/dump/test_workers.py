"""Several workers at a time over one corpus: retries, progress, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.dump import dump
from pipeline.dump.workers import Pool, visible_devices
from pipeline.errors import ConfigError, FailedError
from pipeline.progress import Progress
from storage import LogitDataset, verify
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import SCRIPT, rows, settings


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "corpus.jsonl", some_texts(400))


def command(tmp_path: Path, model_path: Path, corpus: Path) -> list[str]:
    given = [f"--model={model_path}", f"--corpus.path={corpus}", f"--output={tmp_path / 'many'}"]
    given += ["--k=8", "--max_length=100", "--shard_tokens=500", "--engine=transformers"]
    return [sys.executable, str(SCRIPT), *given, "--partitions=2", "--workers=2"]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.long
def test_a_killed_worker_is_started_again_and_an_interrupt_stops_all(
    tmp_path: Path, model_path: Path, corpus: Path
) -> None:
    dump.run(settings(tmp_path, model_path, corpus))
    words = command(tmp_path, model_path, corpus)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stderr=log)
        deadline = time.monotonic() + 200
        while not (tmp_path / "many" / "00001" / "00001.json").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        while "; retrying" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 75
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        assert verify(tmp_path / "many", partial=True).ok
        subprocess.run(words, check=True, stderr=log)
    assert rows(tmp_path / "many") == rows(tmp_path / "dump")
    assert len(LogitDataset(tmp_path / "many").manifest.partitions) == 2


FAKE = """
import json, os, pathlib, sys
partition = int(sys.argv[-1].split("/")[0])
tries = pathlib.Path(sys.argv[1]) / str(partition)
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
state = {"done": 10, "total": 10, "status": "reading"}
os.write(int(os.environ["MOL_PROGRESS_FD"]), (json.dumps(state) + "\\n").encode())
if partition == 1: sys.exit(4)  # damaged: every time
if partition == 2: sys.exit(2)  # bad input: no second attempt
if partition == 3 and tries.read_text() == "x": os.kill(os.getpid(), 9)
"""


def test_a_failed_partition_is_retried_and_the_others_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", FAKE, str(tmp_path)]
    pool = Pool(command, list(range(6)), of=6, workers=2, devices=1)
    progress = Progress(unit="document")
    with pytest.raises(FailedError, match=r"1 \(exit code 4\)") as failed:
        pool.run(progress)
    progress.close()
    assert "2 (exit code 2)" in str(failed.value)
    tries = [len((tmp_path / str(partition)).read_text()) for partition in range(6)]
    assert tries == [1, 3, 1, 2, 1, 1]
    assert set(pool.finished) == {0, 3, 4, 5}
    assert (progress.done, progress.total) == (40, 40)
    assert "partition 3: ended with exit code -9; retrying" in capsys.readouterr().err


def test_fewer_partitions_than_workers_are_refused(
    tmp_path: Path, model_path: Path, corpus: Path
) -> None:
    with pytest.raises(ConfigError, match="only 1 partitions; set partitions to 2"):
        dump.run_workers(settings(tmp_path, model_path, corpus, workers=2), [])


def test_each_worker_sees_its_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_devices(1, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    with pytest.raises(ConfigError, match="3 engines of 2 GPUs each need 6, found 4"):
        visible_devices(2, 2)
