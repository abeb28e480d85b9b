"""A wrapper's language model is told apart from its towers."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.models.decoder import decoder_of
from pipeline.models.directory import ModelFolder
from pipeline.models.language_part import freeze_other_parts, other_parts
from pipeline.training.student import with_lora
from tests.helpers.models import tiny_model
from tests.helpers.runs import settings
from tests.helpers.wrappers import WRAPPERS, tiny_wrapper

LLAVA = ["model.multi_modal_projector", "model.vision_tower"]
PARTS = {
    "gemma3": LLAVA,
    "mistral3": LLAVA,
    "qwen2_5_vl": ["model.visual"],
    "qwen3_vl": ["model.visual"],
    "qwen3_5": ["model.visual"],
    "llama4": ["multi_modal_projector", "vision_model"],
}


@pytest.fixture(scope="module", params=sorted(WRAPPERS))
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wrapper(tmp_path_factory.mktemp(request.param), request.param)


def test_a_wrapper_is_read_as_what_it_is(wrapper: Path) -> None:
    folder = ModelFolder.find(str(wrapper))
    folder.check_weights()
    model = folder.load("float32")
    assert [type(model).__name__] == folder.architectures == [type(folder.empty()).__name__]
    assert (folder.vocab_size, folder.longest, folder.dtype()) == (520, 2048, "float32")
    decoder = decoder_of(model)
    assert model.get_input_embeddings() in list(decoder.modules())
    assert model.get_output_embeddings() not in list(decoder.modules())
    assert freeze_other_parts(model) == PARTS[folder.config.model_type]
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(tuple(PARTS[folder.config.model_type]))
    }


def lora(tmp_path: Path, wrapper: Path, **given: Any) -> TrainConfig:
    return settings(tmp_path, wrapper, None, wrapper, mix=0, max_length=64, lora=given)


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "o_proj", "proj", "linear_1", "qkv", "gate_proj"]},
        {"target_modules": r".*\.(q_proj|gate_proj|qkv)"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.q_proj"},
    ],
)
def test_adapters_stay_out_of_the_towers(
    wrapper: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    model = ModelFolder(wrapper).empty()
    outside = tuple(f"base_model.model.{name}." for name in freeze_other_parts(model))
    adapted = with_lora(model, lora(tmp_path, wrapper, r=4, **given))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert any("gate_proj" in name or "in_proj" in name or "o_proj" in name for name in trained)
    assert not [name for name in trained if name.startswith(outside)]
    if "exclude_modules" in given:
        assert not [name for name in trained if ".q_proj." in name]


def test_a_plain_model_has_no_other_parts(tmp_path: Path) -> None:
    model = ModelFolder(tiny_model(tmp_path)).empty()
    assert other_parts(model) == {}
    assert freeze_other_parts(model) == []
    assert all(weight.requires_grad for weight in model.parameters())


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "t5gemma", "architectures": ["T5GemmaForConditionalGeneration"]}'
    )
    with pytest.raises(ConfigError, match=r"config\.json: .* is an encoder with a decoder"):
        ModelFolder.find(str(tmp_path)).check_weights(strict=False)
