"""Tiny random models of architectures that differ in attention, layers or head."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.helpers.models import tiny_tokenizer

VOCABULARY = 512
DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # makes distributions far from uniform
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
WITHOUT_HEAD_DIM = {name: value for name, value in DENSE.items() if name != "head_dim"}
OLD: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DENSE),
    "qwen3": ("Qwen3", DENSE),
    "mistral": ("Mistral", DENSE | {"sliding_window": 4}),
    "gemma2": ("Gemma2", DENSE | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gpt_oss": ("GptOss", DENSE | EXPERTS | {"sliding_window": 4}),
    "cohere2": ("Cohere2", DENSE | {"sliding_window": 4, "logit_scale": 0.25}),
    "granite": ("Granite", DENSE | {"logits_scaling": 4.0}),
    "hyperclovax": ("HyperCLOVAX", DENSE | {"logits_scaling": 0.25}),
    "llama4": (
        "Llama4",
        DENSE
        | {"intermediate_size": 24, "intermediate_size_mlp": 48, "num_local_experts": 2}
        | {"attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"]},
    ),
    "falcon": ("Falcon", OLD | {"num_hidden_layers": 2, "num_attention_heads": 4}),
    "falcon_alibi": (
        "Falcon",
        OLD | {"num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
    "bloom": ("Bloom", OLD | {"n_layer": 2, "n_head": 4}),
    "mamba2": (
        "Mamba2",
        OLD
        | {"num_hidden_layers": 2, "expand": 2, "num_heads": 4, "head_dim": 16}
        | {"state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "lfm2": ("Lfm2", WITHOUT_HEAD_DIM | {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("FalconH1", DENSE | MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "granite4": (
        "GraniteMoeHybrid",
        WITHOUT_HEAD_DIM
        | MAMBA
        | EXPERTS
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16}
        | {"logits_scaling": 4.0},
    ),
    "qwen3_next": (
        "Qwen3Next",
        DENSE
        | LINEAR
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
    ),
}


def tiny(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of one of KINDS in evaluation mode, with `changes` of its config."""
    name, given = KINDS[kind]
    config = next(
        getattr(transformers, found)
        for found in (f"{name}TextConfig", f"{name}Config")
        if hasattr(transformers, found)
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config(**given | changes))
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others do not know float64
    return model.eval()


def saved(model: PreTrainedModel, path: Path) -> Path:
    """The model as a directory, with a tokenizer of its vocabulary."""
    tiny_tokenizer(path, VOCABULARY)
    model.save_pretrained(path)
    return path


def sharpened(model: PreTrainedModel, by: float) -> PreTrainedModel:
    """The model with larger queries and keys, so that a cap of the attention scores bites."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight *= by
    return model


def logits_alone(model: PreTrainedModel, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits [T, V] of packed ids [T], each sequence in a forward of its own."""
    parts = ids.split(lengths)
    return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
