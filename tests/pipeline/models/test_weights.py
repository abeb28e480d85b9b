"""Weights are those of the files: what is missing, renamed, cut off or a pickle is named."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.models.weights import headers, weight_files
from tests.helpers.models import quantise_int8, tiny_model

Weights = dict[str, torch.Tensor]


def rewrite(model: Path, change: Callable[[Weights], Weights]) -> Path:
    """Change the tensors of a model directory."""
    file = model / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return model


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


def prefixed(weights: Weights) -> Weights:
    return {f"module.{name}": weight for name, weight in weights.items()}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (prefixed, ["its weights lack", "model.embed_tokens.weight", "as in module."]),
        (without("layers.1."), ["model.layers.1.input_layernorm.weight", "and 7 more"]),
        (without("k_norm"), ["lack model.layers.0.self_attn.k_norm.weight"]),
    ],
)
def test_missing_weights_are_named(
    tmp_path: Path, tie: bool, change: Callable[[Weights], Weights], words: list[str]
) -> None:
    folder = ModelFolder(rewrite(tiny_model(tmp_path, tie=tie), change))
    checks = (folder.check_weights, lambda: folder.check_weights(strict=False))
    for work in (lambda: folder.load("float32"), *checks):
        with pytest.raises(ConfigError) as refused:
            work()
        for word in words:
            assert word in str(refused.value)


def test_a_head_that_is_not_tied_is_needed(tmp_path: Path) -> None:
    """Only the config says whether it is missing."""
    tied = rewrite(tiny_model(tmp_path / "tied"), without("lm_head"))
    ModelFolder(tied).load("float32")
    own = rewrite(tiny_model(tmp_path / "own", tie=False), without("lm_head"))
    with pytest.raises(ConfigError, match=r"lack lm_head\.weight"):
        ModelFolder(own).load("float32")


def test_another_shape_is_named(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10**9}))
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight: config\.json makes it \[1000000"):
        ModelFolder(tmp_path).load("float32")


def test_weights_that_are_not_used_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"model.layers.7.extra.weight": torch.ones(2)}
    ModelFolder(rewrite(tiny_model(tmp_path), lambda w: w | more)).load("float32")
    assert "no place for model.layers.7.extra.weight" in capsys.readouterr().err


def test_sharded_and_pickled_weights_are_whole(tmp_path: Path) -> None:
    model = ModelFolder(tiny_model(tmp_path / "one")).load("float32")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    sharded = ModelFolder(tmp_path / "sharded")
    assert len(weight_files(sharded.path)) > 1
    sharded.load("float32")
    tiny_model(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    ModelFolder(tmp_path / "bin").load("float32")


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    ModelFolder(tiny_model(tmp_path / "one")).load("float32").save_pretrained(
        tmp_path / "two", max_shard_size="100KB"
    )
    gone = weight_files(tmp_path / "two")[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=f"it names {gone.name}, which is not there"):
        ModelFolder(tmp_path / "two").load("float32")
    index = tmp_path / "two" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../one/model.safetensors"}}))
    with pytest.raises(ConfigError, match="expected names of files beside it"):
        weight_files(tmp_path / "two")


def test_quantised_weights_are_compared_by_name(tmp_path: Path) -> None:
    folder = ModelFolder(quantise_int8(tiny_model(tmp_path)))
    folder.check_weights(strict=False)
    rewrite(tmp_path, without("layers.1.mlp"))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        folder.check_weights(strict=False)


@pytest.mark.parametrize("bytes_left", [0, 5, 300, 60_000])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, bytes_left: int) -> None:
    file = tiny_model(tmp_path) / "model.safetensors"
    os.truncate(file, bytes_left)
    with pytest.raises(ConfigError, match=r"model\.safetensors: the weights cannot be read"):
        ModelFolder(tmp_path).load("float32")


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.file,))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    for work in (ModelFolder(folder).check_weights, lambda: ModelFolder(folder).load("float32")):
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*never run"):
            work()
    assert not (tmp_path / "ran").exists()


def test_headers_take_no_memory(model_path: Path) -> None:
    found = headers(model_path / "model.safetensors")
    assert found["model.embed_tokens.weight"].shape == (512, 64)
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
