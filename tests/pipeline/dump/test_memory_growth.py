"""The memory of a dump does not grow with the corpus."""

import time
from pathlib import Path

import pytest

from storage import LogitDataset
from tests.helpers import kills
from tests.helpers.corpora import some_texts, write_texts


def peak_of(pid: int) -> tuple[float, int]:
    """(largest anonymous memory in MiB, exit code) of a process, watched until it ends."""
    peak = 0.0
    while True:
        with_status = Path(f"/proc/{pid}/status").read_text().splitlines()
        sizes = [line.split()[1] for line in with_status if line.startswith("RssAnon")]
        peak = max([peak, *(int(size) / 1024 for size in sizes)])
        code = kills.ended(pid)
        if code is not None:
            return peak, code
        time.sleep(0.02)


@pytest.mark.long
def test_ten_times_the_corpus_takes_no_more_memory(
    tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks, tokens = [], []
    for times in (1, 10):
        corpus = write_texts(tmp_path / f"{times}.jsonl", some_texts(120 * times))
        words = [f"--model={model_path}", f"--corpus.path={corpus}", "--engine=transformers"]
        words += [f"--output={tmp_path / str(times)}", "--k=64", "--shard_tokens=10000"]
        peak, code = peak_of(kills.start(words, tmp_path / "log"))
        assert code == 0, (tmp_path / "log").read_text()
        peaks.append(peak)
        tokens.append(int(LogitDataset(tmp_path / str(times)).lengths.sum()))
    with capsys.disabled():
        print(
            f"\npeak anonymous memory: {peaks[0]:.0f} MiB for {tokens[0]:,} tokens, "
            f"{peaks[1]:.0f} MiB for {tokens[1]:,}"
        )
    answers = (tokens[1] - tokens[0]) * 8 * 64 / 2**20  # MiB of distributions in memory
    assert answers > 60
    assert peaks[1] - peaks[0] < answers / 3
