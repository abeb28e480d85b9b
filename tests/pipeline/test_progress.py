"""The progress lines of long work, as a scheduler sees them."""

import json
import os
import time

import pytest

from pipeline import progress
from pipeline.progress import Progress


def test_lines_are_printed_while_nothing_advances(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert progress.SECONDS <= 10
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    shown = Progress(unit="document")
    shown.status = "starting vllm"
    wait_for_lines(capsys, "starting vllm, ")
    shown.begin(total=40, done=10)
    shown.update(20, lambda: "7 tokens/s")
    wait_for_lines(capsys, "20/40 documents", "s left: 7 tokens/s")
    shown.close()


def wait_for_lines(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    text, deadline = "", time.monotonic() + 20
    while not all(word in text for word in words):
        assert time.monotonic() < deadline, text
        time.sleep(0.02)
        text += capsys.readouterr().err


def test_a_worker_reports_to_the_process_that_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(progress.REPORT_TO, str(writer))
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.01)
    shown = Progress(total=5, unit="document")
    shown.update(3, lambda: "fine")
    with os.fdopen(reader) as lines:
        while (state := json.loads(lines.readline()))["done"] != 3:
            assert state == {"done": 0, "total": 5, "status": "starting"}
        assert state == {"done": 3, "total": 5, "status": "fine"}
        shown.close()
    os.close(writer)
