"""Generation configs: what ends a text, and one that transformers refuses to save."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.directory import ModelFolder
from pipeline.models.generation import NAME, end_ids
from pipeline.study import arms
from pipeline.training import train
from pipeline.training.output import Output
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.runs import settings


def test_the_student_has_its_base_s_own(tmp_path: Path, model_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(model_path, model)
    file = model / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.6}))
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    training = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    train.run(settings(tmp_path, model, None, domain, mix=0, max_length=64, training=training))
    student = ModelFolder(tmp_path / "run" / "model")
    assert (student.path / file.name).read_bytes() == file.read_bytes()
    assert student.config.use_cache == ModelFolder(model).config.use_cache is True

    arms.interpolate(ModelFolder(model), student, 0.5, Output(tmp_path / "half", {}))
    assert (tmp_path / "half" / "model" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (None, [0]),
        ({}, [0]),
        ({"eos_token_id": 7}, [0, 7]),
        ({"eos_token_id": [9, 7]}, [0, 7, 9]),
        ({"eos_token_id": [512, -1, True, "x", 3]}, [0, 3]),
    ],
)
def test_ids_that_end_a_text(tmp_path: Path, model_path: Path, given: Any, ids: list[int]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_path, folder)
    (folder / NAME).unlink()
    if given is not None:
        (folder / NAME).write_text(json.dumps(given))
    assert end_ids(ModelFolder(folder)) == ids
