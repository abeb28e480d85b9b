"""A tiny random chat model, and chat templates of the usual kinds."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.helpers.models import tiny_model, tiny_tokenizer

START, END = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(
    path: Path, template: str = CHATML, vocab_size: int = 512
) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of ChatML, saved to `path`."""
    tokenizer = tiny_tokenizer(path, vocab_size - 2)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return tokenizer


def chat_model(path: Path, ends: list[int] | None = None) -> Path:
    """A tiny random model that ends its text with any of the ids `ends`; returns `path`."""
    tiny_model(path)
    chat_tokenizer(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends or [0]}))
    return path
