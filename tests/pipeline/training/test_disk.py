"""Failures of the disk while a run writes."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from pipeline.errors import ConfigError, FailedError
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


class Harmful:
    """A pickle that runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_damaged_checkpoint_is_named_and_runs_nothing(tmp_path: Path, model_path: Path) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(6)])
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    config = settings(tmp_path, model_path, None, domain, mix=0, max_length=64, training=training)
    train.run(config)
    run = Path(config.output)
    shutil.rmtree(run / "checkpoint-2")
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    checkpoint, harm = run / "checkpoint-1", tmp_path / "harm"
    for name, part in [
        ("optimizer.pt", "its optimizer or scheduler state cannot be read"),
        ("scheduler.pt", "its optimizer or scheduler state cannot be read"),
        ("rng_state.pth", "its random number state cannot be read"),
        ("model.safetensors", "its weights cannot be read"),
        ("trainer_state.json", "trainer_state.json: expected a JSON object"),
    ]:
        content = (checkpoint / name).read_bytes()
        torch.save(Harmful(harm), checkpoint / name)
        with pytest.raises(ConfigError, match=part):
            train.run(config)
        assert not harm.exists()
        (checkpoint / name).write_bytes(content)
    assert train.run(config)["steps"] == 2
