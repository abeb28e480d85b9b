"""Whether stage two could train a model, as far as its files say without the weights."""

from pipeline.errors import ConfigError
from pipeline.models.decoder import decoder_of
from pipeline.models.directory import ModelFolder
from pipeline.models.head import linear_head
from pipeline.models.vocabulary import check_ids
from pipeline.passed import reason


def check_trainable(folder: ModelFolder) -> None:
    """ConfigError for a base model that stage two would refuse, so that it is not dumped first.

    transformers must know it as a causal language model with a plain linear head on a decoder, and
    the head needs a column for each id of the tokenizer. Nothing but shapes is made.
    """
    check_ids(folder)
    try:
        model = folder.empty()
    except Exception as error:  # whatever the values of config.json make transformers do
        raise unfit(
            folder, f"transformers makes no causal language model of it: {reason(error)}"
        ) from error
    try:
        linear_head(model)
        decoder_of(model)
    except ConfigError as error:
        raise unfit(folder, str(error)) from error


def unfit(folder: ModelFolder, why: str) -> ConfigError:
    return ConfigError(
        f"model {folder}: stage two could not train it, so a dump would be of no use ({why})"
    )
