"""generation_config.json: transformers loads some that it refuses to save, such as a temperature
without do_sample. They must not keep a student from being saved."""

import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

NAME = "generation_config.json"


def make_savable(model: PreTrainedModel) -> None:
    """Give the model a plain generation config, where its own could not be saved."""
    if not is_savable(model.generation_config):
        model.generation_config = GenerationConfig.from_model_config(model.config)


def keep_own(base: Path, saved: Path) -> None:
    """Copy a base's generation config that could not be saved, as it is."""
    if (base / NAME).exists() and not is_savable(GenerationConfig.from_pretrained(base)):
        shutil.copyfile(base / NAME, saved / NAME)


def is_savable(config: GenerationConfig | None) -> bool:
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError:
        return False
    return True
