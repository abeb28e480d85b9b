"""The head behind the logits: what it may be, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.models.attention import enable_packing
from pipeline.models.head import (
    LogitTransform,
    check_head,
    hidden_states,
    linear_head,
    logit_transform,
)


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


def test_scale_and_soft_cap_are_read_from_the_config(model: PreTrainedModel) -> None:
    assert logit_transform(model) == LogitTransform() == (1.0, None)
    model.config.logit_scale, model.config.logits_scaling = 0.5, 4.0
    model.config.final_logit_softcapping = 2.0
    transform = logit_transform(model)
    assert transform == (0.125, 2.0)
    torch.testing.assert_close(
        transform(torch.tensor([8.0, -800.0])),
        torch.tensor([2 * math.tanh(0.5), -2.0]),
    )


def test_a_head_that_does_more_is_refused(model: PreTrainedModel) -> None:
    check_head(model)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden) + 3.0  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="differ by 3"):
        check_head(model)
    model.lm_head = nn.Sequential(nn.Linear(64, 512))
    with pytest.raises(ConfigError, match="plain linear layer is needed"):
        linear_head(model)
