"""generation_config.json: the ids that end a text. transformers loads some that it refuses to save,
such as a temperature without do_sample; they must not keep a student from being saved."""

import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from pipeline.models.directory import ModelFolder
from pipeline.models.files import read_json

NAME = "generation_config.json"


def end_ids(folder: ModelFolder) -> list[int]:
    """Ids that end what the model writes: those of generation_config.json, or of config.json, and
    the tokenizer's end of text. Raises ConfigError for a file that cannot be read."""
    given = folder.config.get_text_config().eos_token_id
    if (folder.path / NAME).exists():
        given = read_json(folder.path / NAME).get("eos_token_id", given)
    found = given if isinstance(given, list) else [given]
    ids = {each for each in [*found, folder.tokenizer.eos_token_id] if type(each) is int}
    return sorted(each for each in ids if 0 <= each < folder.vocab_size)


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
