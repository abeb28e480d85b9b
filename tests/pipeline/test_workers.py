"""Several dumps at a time over one corpus: retries, progress, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import dump
from pipeline.config import ConfigError
from pipeline.workers import visible_devices
from storage import LogitDataset, verify
from tests.pipeline.corpora import some_texts, write_texts
from tests.pipeline.test_dump import SCRIPT, rows, settings


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "corpus.jsonl", some_texts(1500))


def command(tmp_path: Path, model_path: Path, corpus: Path) -> list[str]:
    given = [f"--model={model_path}", f"--corpus.path={corpus}", f"--output={tmp_path / 'many'}"]
    given += ["--k=8", "--max_length=100", "--shard_tokens=500", "--engine=transformers"]
    return [sys.executable, str(SCRIPT), *given, "--partitions=3", "--workers=2"]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
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
        while "is started again" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 75
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        assert verify(tmp_path / "many", partial=True).ok
        (tmp_path / "many" / "00002").mkdir(exist_ok=True)
        blocked = tmp_path / "many" / "00001" / "complete.json"
        blocked.mkdir()  # partition 1 cannot be finished; the others are
        assert subprocess.run(words, stderr=log).returncode == 1
    text = (tmp_path / "log").read_text()
    assert "partition 1: failed with exit code 1, given up" in text
    assert "[0] " in text
    done = [(tmp_path / "many" / f"0000{n}" / "complete.json").is_file() for n in range(3)]
    assert done == [True, False, True]
    blocked.rmdir()
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    assert rows(tmp_path / "many") == rows(tmp_path / "dump")
    assert len(LogitDataset(tmp_path / "many").manifest.partitions) == 3


def test_fewer_partitions_than_workers_are_refused(
    tmp_path: Path, model_path: Path, corpus: Path
) -> None:
    with pytest.raises(ConfigError, match="only 1 partitions; set partitions to 2"):
        dump.run_workers(settings(tmp_path, model_path, corpus, workers=2), [])


def test_each_worker_sees_its_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_devices(1, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    with pytest.raises(ConfigError, match="3 engines of 2 GPUs each need 6, there are 4"):
        visible_devices(2, 2)
