"""Tiny wrappers of language models, with a vision tower, random weights and processor files."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from tests.helpers.models import tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 520,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "num_position_embeddings": 16,
}
QWEN_IDS = {
    "image_token_id": 510,
    "video_token_id": 511,
    "vision_start_token_id": 512,
    "vision_end_token_id": 513,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 64, "query_pre_attn_scalar": 32},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "boi_token_index": 510,
        "eoi_token_index": 511,
        "image_token_index": 512,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]}},
        "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0], "window_size": 56},
        "tie_word_embeddings": False,
        **QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {**ROPE, "mrope_section": [4, 6, 6], "mrope_interleaved": True},
        },
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": True,
        **QWEN_IDS,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**SIGLIP, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": 510,
    },
    "qwen3_5": {
        "text_config": {
            **TEXT,
            "rope_parameters": {
                **ROPE,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "vision_config": QWEN_VISION,
        **QWEN_IDS,
    },
    "llama4": {
        "text_config": {
            **TEXT,
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 128,
        },
        "vision_config": {
            **SIGLIP,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 128,
        },
        "image_token_index": 510,
        "boi_token_index": 511,
        "eoi_token_index": 512,
    },
}
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def tiny_wrapper(path: Path, kind: str) -> Path:
    """A model directory of this model_type with tiny_tokenizer and processor files."""
    torch.manual_seed(0)
    tiny_tokenizer(path)
    config = AutoConfig.for_model(kind, **WRAPPERS[kind])
    AutoModelForMultimodalLM.from_config(config).save_pretrained(path)
    for name in PROCESSOR:
        (path / name).write_text(json.dumps({"of": name}))
    return path
