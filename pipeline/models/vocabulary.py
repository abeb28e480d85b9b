"""Whether a model's head has a column for every id of its tokenizer."""

from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder


def check_ids(folder: ModelFolder) -> None:
    """ConfigError where the tokenizer has ids that the head lacks."""
    ids = len(folder.tokenizer)
    if ids > folder.vocab_size:
        raise ConfigError(
            f"model {folder}: its tokenizer has {ids} tokens, its head {folder.vocab_size}; one of "
            "them is another model's, or tokens were added without resizing the model"
        )
