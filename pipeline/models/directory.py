"""A Hugging Face model directory: what it says of itself, its tokenizer, its model."""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from pipeline.errors import ConfigError
from pipeline.models import weights
from pipeline.models.attention import take_exact_attention
from pipeline.models.files import read_json, refuse_links_out
from pipeline.models.quantization import keep_differentiable, quantization_config
from pipeline.outside import failure, is_outside
from pipeline.passed import reason
from pipeline.types import Json
from storage.plan import DTYPES

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
VOCABULARIES = ("tokenizer.json", "tokenizer.*.json", "tekken.json", "vocab.*", "*.model")
"""Files that transformers makes the vocabulary of any tokenizer from; some classes have others."""
# Seconds for which transformers would ask on the terminal whether to run a model's own code, where
# something calls it without saying so. 0: it refuses.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
MOST_LAYERS = 10_000
# What config.json says of how it was saved and is used, and not of what the model computes.
SAVING = ("_name_or_path", "transformers_version", "use_cache", "auto_map")
# Its encoding differs between tokenizers that share a vocabulary and differ in their rules.
PROBE = "The 12 cafés' naïve  test:\n\tdef f(x): return x**2  # 测试 🙂\r\n\n<s>[INST]<|im_end|>"


@dataclass(frozen=True)
class ModelFolder:
    """A local model directory. What it says of itself is read once, without its weights.

    Code in the directory is never run: trust_remote_code is False wherever transformers takes it.
    """

    path: Path

    @classmethod
    def find(cls, model: str, revision: str | None = None) -> "ModelFolder":
        """The directory `model`, or the hub's model of that name, which is downloaded.

        Raises ConfigError where there is none, for a config.json that cannot be used, and for links
        to files outside of the directory.
        """
        folder = Path(model).expanduser()
        if not folder.is_dir():
            if model.startswith((".", "/", "~")) or model.count("/") > 1:
                raise ConfigError(f"model {model}: no such directory")
            folder = download(model, revision)
        if not (folder / "config.json").exists():
            raise ConfigError(f"model {model}: {folder} has no config.json, so it is not a model")
        refuse_links_out(folder)
        if (folder / "adapter_config.json").exists():
            raise ConfigError(
                f"model {model}: adapter_config.json makes it an adapter of another model. Merge "
                "it (peft's merge_and_unload), and name the directory of the result"
            )
        found = cls(folder)
        _ = found.config  # a broken one is named before anything else is read
        return found

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """config.json, as transformers reads it; ConfigError for one that cannot be used."""
        file = self.path / "config.json"
        given = read_json(file)
        kind = given.get("model_type")
        if "auto_map" in given and kind not in CONFIG_MAPPING:
            raise ConfigError(
                f"{file}: model_type {kind!r} needs code of its own (auto_map), which is never "
                "run. Use a model that transformers knows"
            )
        try:
            check_values(given)
            found = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever the values make it do
            raise ConfigError(
                f"{file}: cannot be used (model_type {kind!r}): {reason(error)}"
            ) from error
        return found

    @cached_property
    def stated(self) -> dict[str, str]:
        """What config.json itself says of the model: JSON texts by dotted name, no defaults."""
        return dict(sorted(leaves(read_json(self.path / "config.json"))))

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
        own = self.config.get_text_config().dtype or self.config.dtype or "float32"
        found = name if name != "auto" else str(own).removeprefix("torch.")
        if found not in DTYPES or found == "auto":
            where = "dtype" if name != "auto" else f"{self.path / 'config.json'}: dtype"
            raise ConfigError(f"{where}: expected bfloat16, float16 or float32, found {found!r}")
        return found

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ConfigError where it has none, and for a broken file of it."""
        there = [self.path / name for name in TOKENIZER_FILES if (self.path / name).exists()]
        for file in there:
            if file.suffix == ".json":
                read_json(file)
        try:
            if not there:
                raise ValueError("none of its files is there")
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=False
            )
            if not self.has_vocabulary(tokenizer):  # transformers makes an empty one
                raise ValueError("no file of its vocabulary is there")
        except Exception as error:  # the tokenizers library raises Exception itself
            files = ", ".join(file.name for file in there)
            raise ConfigError(
                f"model {self}: no tokenizer ({reason(error)}). "
                + (f"Found {files}. " if files else "")
                + "Put the base model's tokenizer.json and tokenizer_config.json into the directory"
            ) from None
        return tokenizer

    def has_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether there is a file of the tokenizer's vocabulary, or it needs none, as of bytes."""
        own = set(tokenizer.vocab_files_names.values()) - {"tokenizer_config.json"}
        patterns = {*VOCABULARIES, *own}
        return not own or any(file for each in patterns for file in self.path.glob(each))

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

    def check_weights(self, strict: bool = True) -> None:
        """ConfigError where the weights lack a tensor, or have one of another shape.

        Reads headers alone. `strict` is False for an engine that may know more layouts.
        """
        _ = self.auto_class
        try:
            empty = self.empty()
        except ConfigError:
            if strict:
                raise
            return  # an engine's own architecture
        weights.check(self.path, type(empty), empty.config, strict)

    @property
    def auto_class(self) -> type[AutoModelForCausalLM]:
        """transformers' maker of the model, a wrapper with other inputs too if config.json names
        one; ConfigError for an encoder with a decoder."""
        if self.config.is_encoder_decoder:
            raise ConfigError(
                f"{self.path / 'config.json'}: model_type {self.config.model_type!r} is an encoder "
                "with a decoder. Use a model that is a decoder alone"
            )
        kind = self.config.model_type
        wrapper = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind)
        if wrapper in self.architectures or (
            wrapper and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        ):
            found: type[AutoModelForCausalLM] = AutoModelForMultimodalLM
            return found
        return AutoModelForCausalLM

    def load(
        self, dtype: str, quantization: Json | None = None, device: str = "cpu"
    ) -> PreTrainedModel:
        """The causal language model, on the CPU; ConfigError where its files do not make one.

        Every weight is one of the files': transformers itself would make up what is missing. Eager
        attention is taken where sdpa would leave out what the model's attention does.
        `quantization` has the settings of `models.quantization`; the model is then on `device`,
        where its weights are quantised one by one as they are read.
        """
        self.check_weights()
        options: Json = {}
        if quantization is not None:
            by = quantization_config(quantization)
            options = {"quantization_config": by, "device_map": {"": device}}
        generation = self.path / "generation_config.json"
        if generation.exists():
            read_json(generation)
        try:
            with weights.quiet():
                model: PreTrainedModel
                model, found = self.auto_class.from_pretrained(
                    self.path,
                    dtype=dtype,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(f"model {self}: cannot be loaded: {error}") from error
        weights.refuse_missing(self.path, found["missing_keys"], found["unexpected_keys"])
        keep_differentiable(model)
        take_exact_attention(model)
        return model

    def empty(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model on the meta device: shapes without storage. ConfigError where config.json does
        not make one."""
        try:
            with torch.device("meta"):
                model: PreTrainedModel = self.auto_class.from_config(
                    copy.deepcopy(self.config), dtype=dtype, trust_remote_code=False
                )
        except Exception as error:  # whatever the values of config.json make transformers do
            raise ConfigError(
                f"{self.path / 'config.json'}: cannot be made a model: {reason(error)}"
            ) from error
        return model


def download(model: str, revision: str | None) -> Path:
    """The hub's model in the local cache; ConfigError where the hub does not have it, FailedError
    where the hub does not answer."""
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *WEIGHTS]
    try:
        return Path(
            huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
        )
    except Exception as error:  # network, permission, name
        answer = "did not answer" if is_outside(error) else "does not have it either"
        message = f"model {model}: not a directory, and the hub {answer} ({reason(error)})"
        raise failure(message, error) from error


def check_values(given: dict[str, Any]) -> None:
    """ValueError for a config.json that would start endless work, or load code from the hub."""
    for section in [given, *(value for value in given.values() if isinstance(value, dict))]:
        for name, value in section.items():
            most = {"vocab_size": 1 << 31, "n_layer": MOST_LAYERS}.get(name)
            if name.endswith("_layers"):
                most = MOST_LAYERS
            if most and isinstance(value, int) and not 0 <= value <= most:
                raise ValueError(f"{name}: expected 0 to {most}, found {value}")
            if "attn_implementation" in name and "/" in str(value):
                raise ValueError(f"{name} {value!r} is code from the hub, which is never run")


def leaves(given: Json, above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, JSON text) of every value in a config.json, but for those in `SAVING`."""
    for name, value in given.items():
        if name in SAVING:
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            name = "dtype" if name == "torch_dtype" else name  # as transformers 4 spelled it
            yield f"{above}{name}", json.dumps(value, sort_keys=True)


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
