"""What a model directory tells about the model."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder, tokenizer_fingerprint
from tests.helpers.models import tiny_model


def test_a_directory_says_what_it_is(tmp_path: Path) -> None:
    folder = ModelFolder.find(str(tiny_model(tmp_path, max_length=300, dtype=torch.bfloat16)))
    assert folder.architectures == ["Qwen3ForCausalLM"]
    assert (folder.vocab_size, folder.longest) == (512, 300)
    assert folder.dtype() == "bfloat16"
    assert folder.dtype("float32") == "float32"
    assert folder.config is folder.config
    assert folder.tokenizer is folder.tokenizer
    assert set(folder.tokenizer_files()) >= {"tokenizer.json", "tokenizer_config.json"}
    assert folder == ModelFolder(tmp_path)


def test_an_unnamed_dtype_is_float32(model_path: Path, tmp_path: Path) -> None:
    config = json.loads((model_path / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelFolder(tmp_path).dtype() == "float32"


def test_an_empty_model_has_shapes_and_leaves_the_config_alone(model_path: Path) -> None:
    folder = ModelFolder(model_path)
    empty = folder.empty(torch.bfloat16)
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    assert empty.dtype == torch.bfloat16
    own = folder.config._attn_implementation
    empty.set_attn_implementation("eager")
    assert folder.config._attn_implementation == own
    loaded = folder.load("float32")
    assert [w.shape for w in empty.parameters()] == [w.shape for w in loaded.parameters()]


def test_weights_have_a_fingerprint(model_path: Path, tmp_path: Path) -> None:
    first = ModelFolder(model_path).weights_fingerprint
    assert first == ModelFolder(model_path).weights_fingerprint
    assert first != ModelFolder(tiny_model(tmp_path / "other", seed=5)).weights_fingerprint
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no weights"):
        _ = ModelFolder(tmp_path / "none").weights_fingerprint


def test_the_tokenizer_is_known_by_what_it_does(model_path: Path, tmp_path: Path) -> None:
    tokenizer = ModelFolder(model_path).tokenizer
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(ModelFolder(tmp_path / "saved").tokenizer) == expected
    other = ModelFolder(tiny_model(tmp_path / "other", vocab_size=400)).tokenizer
    assert tokenizer_fingerprint(other) != expected


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        ModelFolder.find(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelFolder.find(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        _ = ModelFolder(tmp_path / "empty").tokenizer
