"""Adapters that peft refuses are named; a wrapper's student is the wrapper that it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeline.config import CorpusConfig, DumpConfig, EvalConfig
from pipeline.dump import dump
from pipeline.errors import ConfigError
from pipeline.evaluation import evaluate
from pipeline.models.directory import ModelFolder
from pipeline.training import train
from pipeline.training.student import with_lora
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.runs import settings
from tests.helpers.wrappers import PROCESSOR, tiny_wrapper


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"no_such": 1}, r"lora\.no_such: .*unexpected keyword"),
        ({"r": -1}, r"lora\.r: .* positive integer"),
        ({"r": {"class_path": "os.system"}}, r"lora\.r: "),
        ({"target_modules": "["}, r"lora\.target_modules: unterminated"),
        ({"target_modules": 5}, "lora"),
        ({"rank_pattern": 5}, "lora"),
        ({"task_type": "X"}, "lora"),
        ({"loftq_config": 5, "init_lora_weights": "loftq"}, "lora"),
        ({"init_lora_weights": "nonsense"}, "lora"),
    ],
)
def test_adapters_that_peft_refuses(
    model_path: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    config = settings(tmp_path, model_path, None, Path("d"), mix=0, max_length=64)
    config.lora = {"target_modules": "all-linear", **given}
    with pytest.raises(ConfigError, match=message):
        with_lora(ModelFolder(model_path).load("float32"), config)


@pytest.mark.parametrize(
    ("kind", "lora", "tower"),
    [
        pytest.param(
            "gemma3",
            None,
            ("model.multi_modal_projector.", "model.vision_tower."),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "qwen2_5_vl",
            {"r": 4, "target_modules": "all-linear"},
            ("model.visual.",),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_wrapper_stays_the_wrapper_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, lora: Any, tower: Any
) -> None:
    model = tiny_wrapper(tmp_path / "model", kind)
    corpus = write_texts(tmp_path / "corpus.jsonl", some_texts(12))
    source = CorpusConfig(str(corpus))
    output = str(tmp_path / "dump")
    dump.run(DumpConfig(str(model), source, output, k=8, max_length=64, engine="transformers"))
    training = {"max_steps": 3, "gradient_checkpointing": True}
    config = settings(tmp_path, model, tmp_path / "dump", corpus, lora=lora, training=training)
    train.run(config)
    said = capsys.readouterr().err
    assert "the dump is this model's" in said
    assert "activations unknown" not in said
    assert f"kept as they are: {', '.join(name.rstrip('.') for name in tower)}" in said

    student = ModelFolder(tmp_path / "run" / "model")
    loaded = student.load("auto")
    assert [type(loaded).__name__] == ModelFolder(model).architectures
    before, after = (read_weights(folder) for folder in (model, student.path))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".layers.1." in name for name in moved)
    base = getattr(transformers, type(loaded).__name__).from_pretrained(model)
    for name, weight in base.state_dict().items():
        if name.startswith(tower):
            assert torch.equal(weight, loaded.state_dict()[name]), name
    for name in PROCESSOR:
        assert (student.path / name).read_bytes() == (model / name).read_bytes()
    assert read_config(student.path) == read_config(model)

    models = {"base": str(model), "student": str(student.path)}
    evaluate.run(EvalConfig(models, domain=source, max_length=64, sequences=4))
    assert "student" in capsys.readouterr().out


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; a part of it may name the dtype, or leave it to the whole."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for part in found.values():
        if isinstance(part, dict):
            part.pop("dtype", None)
    return found


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
