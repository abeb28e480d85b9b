"""Tiny random models with a tokenizer; nothing is downloaded."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
"""English prose that ships with Python: real documents of very different lengths."""

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def tiny_tokenizer(path: Path, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end-of-text token and a chat template, saved to `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return fast


def tiny_model(
    path: Path,
    arch: Literal["qwen3", "llama"] = "qwen3",
    tie: bool = True,
    vocab_size: int = 512,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    max_length: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A Hugging Face model directory with random weights and tiny_tokenizer; returns `path`."""
    torch.manual_seed(seed)
    tiny_tokenizer(path, vocab_size)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tie,
        "eos_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.2,  # makes distributions far from uniform, so that top-k matters
    }
    model = (
        Qwen3ForCausalLM(Qwen3Config(**shape))
        if arch == "qwen3"
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    model.to(dtype).save_pretrained(path)
    return path


def quantise_int8(model: Path) -> Path:
    """Change the projections of a model directory to 8 bit, in the format of compressed-tensors."""
    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].float().abs().amax(dim=1, keepdim=True) / 127
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[name + "_scale"] = scale
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel"},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }
    (model / "config.json").write_text(json.dumps(config))
    return model
