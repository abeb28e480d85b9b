"""What a Hugging Face model directory says of itself without loading weights."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
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
# Text whose encoding tells tokenizers with one vocabulary but other rules apart.
PROBE = "The 12 cafés' naïve  test:\n\tdef f(x): return x**2  # 测试 🙂\r\n\n<s>[INST]<|im_end|>"


def resolve(model: str, revision: str | None = None) -> Path:
    """The model's local directory; a hub name is fetched. ConfigError where there is none."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ConfigError(f"model {model}: no such directory")
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", *WEIGHTS]
        try:
            folder = Path(
                huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
            )
        except Exception as error:  # network, permission, name: all end the same for the user
            raise ConfigError(
                f"model {model}: not a directory, and not to be had from the hub either "
                f"({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error
    if not (folder / "config.json").exists():
        raise ConfigError(f"model {model}: {folder} has no config.json, so it is no model")
    return folder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ConfigError where it has none."""
    try:
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            raise ValueError("none of its files is there")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model {folder}: no tokenizer ({str(error).splitlines()[0]}). Put the base model's "
            "tokenizer.json and tokenizer_config.json into the directory"
        ) from None
    return tokenizer


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The causal LM, on the CPU; ConfigError where its files do not make one."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {folder}: cannot be loaded: {error}") from error
    return model


def load_config(folder: Path) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(folder)


def own_dtype(config: PreTrainedConfig) -> str:
    """The dtype of the model's weights, as its config.json names it; float32 where it does not."""
    dtype = config.get_text_config().dtype or config.dtype or "float32"
    return str(dtype).removeprefix("torch.")


def vocab_size(config: PreTrainedConfig) -> int:
    """Columns of the language model's head."""
    return int(config.get_text_config().vocab_size)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files a dump carries so that its ids can be read as text."""
    found = {name: folder / name for name in TOKENIZER_FILES}
    return {name: path.read_bytes() for name, path in found.items() if path.exists()}


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


def weights_fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of all weight files; reads them once."""
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    if not files:
        raise ConfigError(f"model {folder}: no weights ({' or '.join(WEIGHTS)})")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()
