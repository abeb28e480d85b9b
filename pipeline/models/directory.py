"""A Hugging Face model directory: what it says of itself, its tokenizer, its model."""

import copy
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.errors import ConfigError

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Its encoding differs between tokenizers that share a vocabulary and differ in their rules.
PROBE = "The 12 cafés' naïve  test:\n\tdef f(x): return x**2  # 测试 🙂\r\n\n<s>[INST]<|im_end|>"


@dataclass(frozen=True)
class ModelFolder:
    """A local model directory. What it says of itself is read once, without its weights."""

    path: Path

    @classmethod
    def find(cls, model: str, revision: str | None = None) -> "ModelFolder":
        """The directory `model`, or the hub's model of that name, which is downloaded.

        Raises ConfigError where there is none, and for a directory without config.json.
        """
        folder = Path(model).expanduser()
        if not folder.is_dir():
            if model.startswith((".", "/", "~")) or model.count("/") > 1:
                raise ConfigError(f"model {model}: no such directory")
            folder = download(model, revision)
        if not (folder / "config.json").exists():
            raise ConfigError(f"model {model}: {folder} has no config.json, so it is not a model")
        return cls(folder)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.path)

    @property
    def architectures(self) -> list[str]:
        return list(self.config.architectures or [])

    @property
    def vocab_size(self) -> int:
        """Columns of the language model's head."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that the model reads, where its config names a limit."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def dtype(self, name: str = "auto") -> str:
        """`name`, or for "auto" the dtype that config.json names: float32 where it names none."""
        if name != "auto":
            return name
        own = self.config.get_text_config().dtype or self.config.dtype or "float32"
        return str(own).removeprefix("torch.")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ConfigError where it has none."""
        try:
            if not any((self.path / name).exists() for name in TOKENIZER_FILES):
                raise ValueError("none of its files is there")
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"model {self}: no tokenizer ({str(error).splitlines()[0]}). Put the base model's "
                "tokenizer.json and tokenizer_config.json into the directory"
            ) from None
        return tokenizer

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files that a dump carries so that its ids can be read as text."""
        found = {name: self.path / name for name in TOKENIZER_FILES}
        return {name: path.read_bytes() for name, path in found.items() if path.exists()}

    @cached_property
    def weights_fingerprint(self) -> str:
        """sha256 over the names and contents of all weight files; reads them once."""
        files = sorted(file for pattern in WEIGHTS for file in self.path.glob(pattern))
        if not files:
            raise ConfigError(f"model {self}: no weights ({' or '.join(WEIGHTS)})")
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
        return digest.hexdigest()

    def load(self, dtype: str) -> PreTrainedModel:
        """The causal language model, on the CPU; ConfigError where its files do not make one."""
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model {self}: cannot be loaded: {error}") from error
        return model

    def empty(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model on the meta device: shapes without storage."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(self.config), dtype=dtype
            )
        return model


def download(model: str, revision: str | None) -> Path:
    """The hub's model in the local cache; ConfigError where it cannot be had."""
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *WEIGHTS]
    try:
        return Path(
            huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
        )
    except Exception as error:  # network, permission, name: all end the same for the user
        raise ConfigError(
            f"model {model}: not a directory, and the hub does not have it either "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what the tokenizer does, not of its files, which change when they are saved again.

    Covers every token with its id, the special tokens, and the encoding of a probe text.
    """
    behaviour: list[Any] = [
        sorted(tokenizer.get_vocab().items()),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        tokenizer(PROBE, verbose=False)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(behaviour).encode()).hexdigest()
