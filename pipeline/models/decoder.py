"""The part of a causal language model that its head reads."""

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose `last_hidden_state` the head turns into logits; ConfigError without one.

    Some models name themselves as their decoder, head included; then it is the outermost model
    within that has the input embeddings and not the head.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    named: nn.Module = model.get_decoder()
    if all(module is not head for module in named.modules()):
        return named
    for found in model.modules():
        if isinstance(found, PreTrainedModel):
            parts = list(found.modules())
            if any(part is embeddings for part in parts) and all(
                part is not head for part in parts
            ):
                return found
    raise ConfigError(f"{type(model).__name__}: no decoder without the head was found in it")
