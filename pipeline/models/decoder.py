"""The part of a causal language model that its head reads."""

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose `last_hidden_state` the head turns into logits; ConfigError without one.

    Some models name themselves as their decoder, head included.
    """
    head = model.get_output_embeddings()
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    for found in (model.get_decoder(), model.base_model, *inner):
        if found is not model and all(module is not head for module in found.modules()):
            decoder: nn.Module = found
            return decoder
    raise ConfigError(f"{type(model).__name__}: no decoder without the head was found in it")
