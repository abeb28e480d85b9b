"""The weight files of a model directory, and whether they hold what the model needs.

Only headers are read: names, shapes and dtypes. transformers itself compares them with the model,
on the meta device, so its renaming, merging of experts and tying of weights apply as in a load.
"""

import contextlib
import pickle
import sys
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.models.files import read_json
from pipeline.progress import say

SHOWN = 4  # names in a message
KINDS = [  # in the order in which transformers looks for them
    ("model.safetensors", "*.safetensors"),
    ("pytorch_model.bin", "*.bin"),
]


def weight_files(folder: Path) -> list[Path]:
    """The files that a load reads. ConfigError where there are none, or the index names others."""
    for name, pattern in KINDS:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            return indexed_files(index)
        if found := sorted(folder.glob(pattern)):
            return found
    patterns = " or ".join(pattern for _, pattern in KINDS)
    raise ConfigError(f"model {folder}: no weights ({patterns})")


def indexed_files(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names:
        raise ConfigError(f"{index}: expected a weight_map, the file of each tensor, found none")
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{index}: expected names of files beside it, found {name!r}")
        if not (index.parent / name).is_file():
            raise ConfigError(f"{index}: it names {name}, which is not there. Copy that file, too")
    return [index.parent / name for name in names]


def headers(file: Path) -> dict[str, Tensor]:
    """Every tensor of a weight file, on the meta device; ConfigError for a damaged file."""
    try:
        if file.suffix != ".safetensors":
            # weights_only: a pickle that would run code is an error.
            mapped = zipfile.is_zipfile(file)
            found = torch.load(file, map_location="meta", mmap=mapped, weights_only=True)
            return {name: value for name, value in found.items() if isinstance(value, Tensor)}
        with safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: meta_tensor(part) for name, part in parts.items()}
    except pickle.UnpicklingError:
        reason = "a pickle of something else than tensors, which is never run"
    except Exception as error:  # torch raises whatever the bytes make it do
        reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ConfigError(
        f"{file}: the weights cannot be read: {reason}. The file may be cut off: compare its size "
        "with the original, and copy it again"
    )


def meta_tensor(part: object) -> Tensor:
    """A safetensors tensor's shape. The dtype does not count, so it is always float32."""
    return torch.empty(part.get_shape(), dtype=torch.float32, device="meta")  # type: ignore[attr-defined]


def check(
    folder: Path, kind: type[PreTrainedModel], config: PreTrainedConfig, strict: bool
) -> None:
    """ConfigError, with their names, for tensors that are missing or have another shape.

    They would be made up at random. Tensors that the model has no place for are named on stderr.
    `strict` is False for an engine that may know more layouts than transformers: what transformers
    cannot arrange is then left to the engine. Of quantised weights only the names are compared.
    """
    there: dict[str, Tensor] = {}
    for file in weight_files(folder):
        there |= headers(file)
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised:
        del config.quantization_config
        there |= {with_weight(name): tensor for name, tensor in there.items()}
    try:
        with quiet():
            _, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=there,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the renaming and merging of tensors raises
        if strict and not quantised:
            raise ConfigError(
                f"model {folder}: its weights do not fit its config.json: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return
    missing = found["missing_keys"]
    if quantised:
        missing = [name for name in missing if not has_parts(name, there)]
    refuse_missing(folder, missing, there)
    if quantised:
        return
    for name, held, expected in sorted(found["mismatched_keys"]):
        raise ConfigError(
            f"model {folder}: {name}: config.json makes it {list(expected)}, the weights hold "
            f"{list(held)}. config.json and the weights are of different models"
        )
    if found["unexpected_keys"]:
        unused = named(found["unexpected_keys"])
        say(f"model {folder}: the model has no place for {unused}; not used")


def refuse_missing(folder: Path, missing: Collection[str], there: Collection[str]) -> None:
    if not missing:
        return
    ends = tuple(f".{name}" for name in missing)
    example = next((name for name in sorted(there) if name.endswith(ends)), None)
    hint = f". Is it a prefix, as in {example}? Then rename the tensors" if example else ""
    raise ConfigError(
        f"model {folder}: its weights lack {named(missing)}, which a load would make up at random"
        f"{hint}"
    )


def named(names: Collection[str]) -> str:
    """The first few of them, and how many more there are."""
    first, more = sorted(names)[:SHOWN], len(names) - SHOWN
    return f"{', '.join(first)}" + (f" and {more} more" if more > 0 else "")


def with_weight(name: str) -> str:
    """The name that a quantised tensor would have otherwise: x.qweight, x.weight_packed and
    x.weight_scale are parts of x.weight."""
    module, _, part = name.rpartition(".")
    return name if part in ("weight", "bias") else f"{module}.weight"


def has_parts(name: str, there: Collection[str]) -> bool:
    """Whether a quantised file holds anything of this parameter's module, under whatever names."""
    module = name.rpartition(".")[0] + "."
    return any(found.startswith(module) for found in there)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own report, which has colours in it. Off a terminal, its progress bars
    stay off afterwards too."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars and sys.stderr.isatty():
            transformers.utils.logging.enable_progress_bar()
