"""Packed sequences have the same logits as the sequences alone, which the teacher saw."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.errors import ConfigError
from pipeline.models.attention import PACKED, enable_packing, packing_arguments

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
}
LENGTHS = [3, 17, 2, 9]


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    if kind == "sliding":
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4))
    if kind == "mixed":
        types = ["sliding_attention", "full_attention"]
        window = {"use_sliding_window": True, "sliding_window": 4, "layer_types": types}
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **window))
    capped = Gemma2Config(**SHAPE, attn_logit_softcapping=0.5, final_logit_softcapping=None)
    capped._attn_implementation = "eager"
    return Gemma2ForCausalLM(capped)


def logits_alone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    parts = ids.split(LENGTHS)
    return torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "sliding", "mixed", "soft-capped"])
def test_packed_equals_alone_with_gradients(kind: str) -> None:
    model = make(kind)
    ids = torch.randint(0, 97, (sum(LENGTHS),))
    expected = logits_alone(model, ids)  # with the model's own attention
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    enable_packing(model)
    assert (model.config._attn_implementation == PACKED) == (kind != "soft-capped")
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    found = model(
        ids[None],
        position_ids=positions[None],
        use_cache=False,
        **packing_arguments(model, LENGTHS),
    ).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    (found * weights).sum().backward()
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() < 1e-3 * scale, name
    torch.testing.assert_close(logits_alone(model, ids), expected, rtol=1e-3, atol=1e-3)


def test_a_model_that_mixes_packed_sequences_is_refused() -> None:
    torch.manual_seed(0)
    shape = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    mamba = Mamba2ForCausalLM(
        Mamba2Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, expand=2, **shape)
    )
    with pytest.raises(ConfigError, match="see each other"):
        enable_packing(mamba)
