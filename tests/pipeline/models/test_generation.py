"""A generation config that transformers refuses to save."""

import json
import shutil
from pathlib import Path

from pipeline.models.directory import ModelFolder
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
