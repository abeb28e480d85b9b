"""What a run may delete or replace in its output directory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TrainConfig
from pipeline.data import mixing
from pipeline.errors import RefusedError
from pipeline.training import train
from pipeline.training.output import COMPLETE, MARKER, Output, made_by
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.runs import settings, steps


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a directory with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def put(path: Path, content: str = "weeks of work") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def config(tmp_path: Path, model_path: Path) -> TrainConfig:
    """A short run that saves two checkpoints, and keeps one."""
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(12)])
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    options: dict[str, Any] = {"mix": 0, "max_length": 64, "training": training}
    return settings(tmp_path, model_path, None, domain, **options)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-500/model.safetensors",
        "checkpoint-2/model.safetensors",
        "checkpoint-7",
        "model/model.safetensors",
        "model.draft/notes.txt",
        "metrics.jsonl",
        "summary.json",
    ],
)
def test_what_others_made_is_refused_and_stays(
    config: TrainConfig, tmp_path: Path, name: str
) -> None:
    content = '{"step": 1, "loss": 3}' if name.endswith(("json", "jsonl")) else "weeks of work"
    put(tmp_path / "run" / name, content)
    before = files(tmp_path / "run")
    with pytest.raises(RefusedError, match="choose another output directory"):
        train.run(config)
    after = files(tmp_path / "run")
    assert {name: after.get(name) for name in before} == before


def test_what_does_not_collide_stays(config: TrainConfig, tmp_path: Path) -> None:
    """Rotation counts and deletes the run's own checkpoints alone."""
    run = tmp_path / "run"
    others = ["checkpoint-best/a", "checkpoint-2-copy/a", "checkpoint-9-old/a", "checkpoint/a"]
    for name in others:
        put(run / name)
    train.run(config)
    assert all((run / name).read_text() == "weeks of work" for name in others)
    names = {path.name for path in run.glob("checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-best", "checkpoint-2-copy", "checkpoint-9-old"}


def test_a_checkpoint_that_was_cut_short_is_made_again(config: TrainConfig, tmp_path: Path) -> None:
    config.training["save_total_limit"] = 2
    train.run(config)
    run, expected = tmp_path / "run", steps(config.output)
    (run / "checkpoint-4" / COMPLETE).unlink()
    (run / "summary.json").unlink()
    (run / "checkpoint-3").mkdir()  # died before the marker was written
    train.run(config)
    assert steps(run) == expected
    assert (run / "checkpoint-4" / COMPLETE).exists()
    assert not (run / "checkpoint-3").exists()


def test_checkpoints_of_earlier_releases_are_resumed_from(
    config: TrainConfig, tmp_path: Path, capsys: Any
) -> None:
    """They have the last marker alone; a model beside them was recorded by the summary."""
    config.training["save_total_limit"] = 2
    train.run(config)
    run = tmp_path / "run"
    for marker in run.rglob(MARKER):
        marker.unlink()
    assert train.run(config)["steps"] == 4  # nothing left to do
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoint-4")
    (run / "summary.json").unlink()
    train.run(config)
    assert "resuming from checkpoint-2" in capsys.readouterr().err


def test_a_run_goes_on_in_its_own_orders_or_not_at_all(
    config: TrainConfig, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of earlier releases do not name theirs; those of a short corpus are the same."""
    config.training["save_total_limit"] = 2
    train.run(config)
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoint-4")
    (run / "summary.json").unlink()
    marker = json.loads((run / "checkpoint-2" / COMPLETE).read_text())
    assert marker.pop("orders") == mixing.ORDERS
    monkeypatch.setattr(mixing, "SHORT", 0)
    for orders in ({}, {"orders": mixing.ORDERS + 1}):
        (run / "checkpoint-2" / COMPLETE).write_text(json.dumps(marker | orders))
        before = files(run)
        with pytest.raises(RefusedError, match="checkpoint-2: its run reads sequences in orders"):
            train.run(config)
        assert {name: files(run).get(name) for name in before} == before
    monkeypatch.undo()
    (run / "checkpoint-2" / COMPLETE).write_text(json.dumps(marker))
    train.run(config)
    assert "resuming from checkpoint-2" in capsys.readouterr().err


def test_a_model_is_replaced_by_the_same_run_alone(config: TrainConfig, tmp_path: Path) -> None:
    train.run(config)
    run = tmp_path / "run"
    (run / "summary.json").unlink()  # died between the model and the summary
    train.run(config)
    assert (run / "summary.json").exists()
    for path in [*run.glob("checkpoint-*"), run / "summary.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files(run / "model")
    config.training["learning_rate"] = 1e-4
    with pytest.raises(RefusedError, match=r"learning_rate: 0\.001 in the run"):
        train.run(config)
    assert files(run / "model") == before


def test_a_model_that_is_gone_is_made_again(config: TrainConfig, tmp_path: Path) -> None:
    summary = train.run(config)
    run = tmp_path / "run"
    weights = (run / "model" / "model.safetensors").read_bytes()
    (run / "model" / "model.safetensors").unlink()
    assert train.run(config)["steps"] == summary["steps"]
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(run / "model")
    train.run(config)
    assert (run / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("content", ["", '{"identity": {"mod'])
def test_files_that_were_cut_short(
    config: TrainConfig, tmp_path: Path, capsys: Any, content: str
) -> None:
    config.training["save_total_limit"] = 2
    train.run(config)
    run = tmp_path / "run"
    (run / "checkpoint-4" / COMPLETE).write_text(content)
    (run / "summary.json").write_text(content)
    train.run(config)
    assert "resuming from checkpoint-2" in capsys.readouterr().err


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    output = Output(tmp_path / "run", {"model": "a"})
    theirs = output.make("theirs")
    (tmp_path / "run" / "checkpoint-1").symlink_to(theirs)
    assert made_by(theirs) == {"model": "a"}
    assert made_by(tmp_path / "run" / "checkpoint-1") is None
    for change in (output.remove, output.check_own):
        with pytest.raises(RefusedError):
            change(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(RefusedError):
        output.make("checkpoint-1")
    assert (theirs / MARKER).exists()


@pytest.mark.parametrize(
    ("limit", "best", "keep_last", "left"),
    [
        (2, None, True, [3, 4]),
        (2, "run/checkpoint-1", True, [1, 4]),
        (1, "run/checkpoint-1", True, [1, 4]),
        (1, "run/checkpoint-1", False, [1]),
        (9, None, True, [1, 2, 3, 4]),
    ],
)
def test_rotation(
    tmp_path: Path, limit: int, best: str | None, keep_last: bool, left: list[int]
) -> None:
    """As transformers rotates, which would also delete what others made."""
    output = Output(tmp_path, {"model": "a"})
    for step in (1, 2, 3, 4):
        output.make(f"checkpoint-{step}")
    Output(tmp_path, {"model": "b"}).make("checkpoint-0")
    output.rotate(limit, best, keep_last)
    names = sorted(path.name for path in output.checkpoints())
    assert names == [f"checkpoint-{step}" for step in [0, *left]]
