"""The part of a causal language model that its head reads."""

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose `last_hidden_state` the head turns into logits; ConfigError without one.

    Some models name themselves as their decoder, head included; a wrapper may then name such a
    model (Llama 4), whose own decoder is meant.
    """
    head, named = model.get_output_embeddings(), model.get_decoder()
    if isinstance(named, PreTrainedModel) and named is not model and has(named, head):
        return decoder_of(named)
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    for found in (named, model.base_model, *inner):
        if found is not model and not has(found, head):
            decoder: nn.Module = found
            return decoder
    raise ConfigError(f"{type(model).__name__}: no decoder without the head was found in it")


def has(module: nn.Module, head: nn.Module) -> bool:
    return any(part is head for part in module.modules())
