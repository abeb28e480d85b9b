"""The part of a model that text goes through; a wrapper has more, such as a vision tower.

Only that part is trained. The rest is kept as it is, so that the student still is a wrapper.
"""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.models.decoder import decoder_of


def other_parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The outermost modules that hold weights, none of them of the decoder or the head, by name;
    empty for a plain language model."""
    own = {id(weight) for part in text_parts(model) for weight in part.parameters()}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        weights = list(module.parameters())
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if weights and not inside and not any(id(weight) in own for weight in weights):
            found[name] = module
    return found


def text_parts(model: PreTrainedModel) -> list[nn.Module]:
    head = model.get_output_embeddings()
    return [decoder_of(model), *([] if head is None else [head])]


def freeze_other_parts(model: PreTrainedModel) -> list[str]:
    """Take the weights that text does not go through out of training; returns their modules."""
    found = other_parts(model)
    for module in found.values():
        module.requires_grad_(False)
    return sorted(found)


def lora_settings(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of peft.LoraConfig that leave `other_parts` without adapters, whatever modules
    `target_modules` means."""
    names = [
        f"{outer}.{name}" if name else outer
        for outer, module in other_parts(model).items()
        for name, _ in module.named_modules()
    ]
    if not names:
        return given
    excluded = given.get("exclude_modules") or []
    if isinstance(excluded, str):  # peft reads a text as a pattern of whole names
        every = "|".join([f"(?:{excluded})", *map(re.escape, names)])
        return {**given, "exclude_modules": every}
    return {**given, "exclude_modules": [*excluded, *names]}
