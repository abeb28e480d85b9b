"""Where a run may write."""

import os
from pathlib import Path

import pytest

from pipeline.config import CorpusConfig, HeldOutConfig
from pipeline.errors import ConfigError
from pipeline.training import train
from pipeline.training.places import refuse_inputs_inside, refuse_output_in_corpus
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model
from tests.helpers.runs import settings


def test_an_output_with_the_model_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    model = tiny_model(tmp_path / "run" / "model")
    weights = (model / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for spelling in (str(tmp_path / "run"), "run/", "./link", "run/../run", "."):
        config = settings(tmp_path, model, None, domain, mix=0, max_length=64, output=spelling)
        with pytest.raises(ConfigError, match=r"contains model .*choose another output"):
            train.run(config)
    assert (model / "model.safetensors").read_bytes() == weights
    assert os.listdir(tmp_path / "run") == ["model"]  # nothing was written


def test_every_input_is_looked_at(tmp_path: Path, model_path: Path, dump_path: Path) -> None:
    outside = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    (tmp_path / "run").mkdir()
    inside = CorpusConfig(str(write_texts(tmp_path / "run" / "a.jsonl", some_texts(3))))
    (tmp_path / "run" / "dump").symlink_to(dump_path)
    dump = str(tmp_path / "run" / "dump")
    for name, changes in {
        "domain.path": {"domain": inside},
        "held_out.other.path": {"held_out": HeldOutConfig(other=inside)},
        "held_out.dump": {"held_out": HeldOutConfig(dump=dump)},
        "dump .*/run/dump": {"dump": {dump: 1.0, str(dump_path): 1.0}},
    }.items():
        config = settings(tmp_path, model_path, dump_path, outside)
        for field, value in changes.items():
            setattr(config, field, value)
        with pytest.raises(ConfigError, match=f"contains {name} "):
            train.run(config)
    assert sorted(os.listdir(tmp_path / "run")) == ["a.jsonl", "dump"]


def test_patterns_stores_and_the_hub(tmp_path: Path) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "a.jsonl").touch()
    refuse_inputs_inside(tmp_path / "run", {"model": "Qwen/Qwen3-8B", "dump": "s3://bucket/run"})
    refuse_inputs_inside(tmp_path / "run", {"model": str(tmp_path / "running")})
    with pytest.raises(ConfigError, match="contains domain"):
        refuse_inputs_inside(tmp_path / "run", {"domain": str(tmp_path / "**" / "*.jsonl")})


def test_an_output_in_a_corpus_is_refused(tmp_path: Path) -> None:
    corpora = {"domain.path": CorpusConfig(str(tmp_path))}
    with pytest.raises(ConfigError, match="would be read as text"):
        refuse_output_in_corpus(tmp_path / "run", corpora)
    refuse_output_in_corpus(tmp_path.parent, corpora)
