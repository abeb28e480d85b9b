"""The head behind the logits: what it may be, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedModel,
)

from pipeline.errors import ConfigError
from pipeline.models.attention import enable_packing
from pipeline.models.decoder import decoder_of
from pipeline.models.head import hidden_states, linear_head, logit_transform
from tests.helpers.architectures import tiny


@pytest.fixture
def model(model_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path).eval()


def test_hidden_states_of_a_packed_row_give_the_logits_of_its_sequences(
    model: PreTrainedModel,
) -> None:
    enable_packing(model)
    first, second = torch.arange(1, 8), torch.arange(40, 51)
    with torch.no_grad():
        alone = [model(input_ids=ids[None]).logits[0] for ids in (first, second)]
        hidden = hidden_states(
            model,
            torch.cat([first, second])[None],
            torch.cat([torch.arange(7), torch.arange(11)])[None],
            [7, 11],
        )
        found = linear_head(model)(hidden)
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


KNOWN = {
    "qwen3": (1.0, None),
    "gemma2": (1.0, 30.0),
    "cohere2": (0.25, None),
    "granite": (0.25, None),
    "granite4": (0.25, None),
    "hyperclovax": (0.25, None),
    "falcon_h1": (0.5, None),
    "llama4": (1.0, None),
    "mamba2": (1.0, None),
}


@pytest.mark.parametrize("kind", list(KNOWN))
def test_scale_and_soft_cap_are_learnt_from_the_logits(kind: str) -> None:
    """Whatever the setting is called; and the logits are those of the linear head."""
    model = tiny(kind)
    transform = logit_transform(model)
    assert transform == KNOWN[kind]
    ids = torch.arange(1, 9)
    with torch.no_grad():
        hidden = hidden_states(model, ids[None], torch.arange(8)[None], [8])
        found, expected = transform(linear_head(model)(hidden)), model(ids[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(scale=st.floats(0.01, 30), cap=st.none() | st.floats(2, 100))
@settings(max_examples=15, deadline=None)
def test_any_scale_and_cap_are_found(dtype: torch.dtype, scale: float, cap: float | None) -> None:
    model = tiny("cohere2", logit_scale=scale).to(dtype)
    plain = model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        output = plain(*arguments, **options)
        if cap is not None:
            output.logits = torch.tanh(output.logits / cap) * cap
        return output

    model.forward = forward
    found = logit_transform(model)
    assert found.scale == pytest.approx(scale, rel=1e-4)
    assert found.soft_cap == (None if cap is None else pytest.approx(cap, rel=1e-4))


def test_a_factor_of_the_hidden_states_is_part_of_the_scale(model: PreTrainedModel) -> None:
    """As MiniCPM divides them in front of its head."""
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 4,))
    assert logit_transform(model) == (0.25, None)


def test_heads_that_do_more_are_refused(model: PreTrainedModel) -> None:
    logit_transform(model)
    plain, bias = model.lm_head.forward, torch.linspace(0, 1, 512)

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        model.lm_head.forward = lambda hidden: change(plain(hidden))

    changed(lambda logits: logits + 3.0)
    with pytest.raises(ConfigError, match="differ from those of the linear head by 3"):
        logit_transform(model)
    changed(lambda logits: logits + bias)
    with pytest.raises(ConfigError, match="differ from those of the linear head by 1"):
        logit_transform(model)
    model.lm_head.forward = plain
    after: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda logits: logits + bias,
        lambda logits: torch.cat([logits[..., :-1], logits[..., -1:] * 1.01], -1),
        lambda logits: logits.clamp(-50, 50),
        lambda logits: logits * logits.abs(),
        lambda logits: logits - logits.mean(-1, keepdim=True) / 2,
    ]
    forward = model.forward
    for change in after:

        def more(*arguments: Any, change: Any = change, **options: Any) -> Any:
            output = forward(*arguments, **options)
            output.logits = change(output.logits)
            return output

        model.forward = more
        with pytest.raises(ConfigError, match="fused loss does not know"):
            logit_transform(model)
    model.forward = forward
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),))
    with pytest.raises(ConfigError, match="more than scaled"):
        logit_transform(model)
    model.lm_head = nn.Sequential(nn.Linear(64, 512))
    with pytest.raises(ConfigError, match="plain linear layer is needed"):
        linear_head(model)


def test_the_decoder_is_found_where_a_model_names_itself() -> None:
    model = tiny("llama4")
    assert model.get_decoder() is model
    assert decoder_of(model) is model.model


def test_the_decoder_of_a_wrapper_is_that_of_its_language_model() -> None:
    """The vision model beside it is a model without the head, too."""
    text = tiny("llama4").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "vision_output_dim": 16}
    vision |= {"projector_input_dim": 16, "projector_output_dim": 16}
    config = Llama4Config(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(config)
    assert decoder_of(model) is model.language_model.model
