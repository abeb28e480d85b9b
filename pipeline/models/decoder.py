"""The part of a causal language model that its head reads."""

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose `last_hidden_state` the head turns into logits; ConfigError without one.

    The decoder holds the input embeddings, which a vision tower does not, and not the head. Some
    models name themselves, head included, and some wrappers name a tower or such a model; then it
    is the outermost model within that does.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for found in (model.get_decoder(), *inner):
        if holds(found, embeddings) and not holds(found, head):
            decoder: nn.Module = found
            return decoder
    raise ConfigError(f"{type(model).__name__}: no decoder without the head was found in it")


def holds(outer: nn.Module, part: nn.Module | None) -> bool:
    return any(module is part for module in outer.modules())
