"""The part of a causal language model that its head reads."""

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose `last_hidden_state` the head turns into logits; ConfigError without one.

    Some models name themselves as their decoder, head included, and some wrappers name such a
    model. The decoder holds the input embeddings, which a vision tower does not.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    named = model.get_decoder()
    if isinstance(named, PreTrainedModel) and named is not model and holds(named, head):
        return decoder_of(named)
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    for found in (named, model.base_model, *inner):
        if found is not model and holds(found, embeddings) and not holds(found, head):
            decoder: nn.Module = found
            return decoder
    raise ConfigError(f"{type(model).__name__}: no decoder without the head was found in it")


def holds(outer: nn.Module, part: nn.Module | None) -> bool:
    return any(module is part for module in outer.modules())
