"""Failures of the disk while a run writes."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from pipeline.errors import FailedError
from pipeline.training import train
from pipeline.training.disk import writing
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.runs import settings


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "denied"), "permission denied"),
        (SafetensorError("I/O error: File too large (os error 27)"), "limit on the size"),
        (RuntimeError("[enforce fail] . unexpected pos 607744 vs 607636"), "is the disk full"),
    ],
)
def test_the_directory_is_named(error: Exception, reason: str) -> None:
    message = f"^out: cannot be written: .*{reason}"
    with pytest.raises(FailedError, match=message), writing(Path("out")):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), SafetensorError("bad header"), FileNotFoundError(2, "x")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), writing(Path("out")):
        raise error


def test_a_run_ends_with_a_message_and_resumes(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(6)])
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    config = settings(tmp_path, model_path, None, domain, mix=0, max_length=64, training=training)
    save = torch.save

    def full(content: Any, place: Any, *rest: Any, **options: Any) -> None:
        if "checkpoint-4" in str(place):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, place, *rest, **options)

    with monkeypatch.context() as disk:
        disk.setattr(torch, "save", full)
        with pytest.raises(FailedError, match="the disk is full"):
            train.run(config)
    assert train.run(config)["steps"] == 4
    assert "resuming from checkpoint-2" in capsys.readouterr().err
