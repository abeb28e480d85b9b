"""The head behind a causal language model's logits, and the hidden states in front of it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.models.attention import packing_arguments


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, sequence_lengths: list[int]
) -> Tensor:
    """[T, D]: the decoder's last hidden states of a packed row.

    input_ids, position_ids  int64 [1, T]
    sequence_lengths         tokens of each sequence of the row
    """
    hidden: Tensor = model.get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,  # with a cache, packed sequences would see each other
        **packing_arguments(model, sequence_lengths),
    ).last_hidden_state[0]
    return hidden


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The output embeddings; ConfigError where they are not a plain linear layer."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).__module__.startswith("peft"):
        raise ConfigError(
            f"the model's head is a {type(head).__name__}; a plain linear layer is needed. With "
            "LoRA, leave lm_head out of lora.target_modules and lora.modules_to_save"
        )
    if head.weight.shape != (head.out_features, head.in_features):
        raise ConfigError(
            f"the model's head is a {type(head).__name__}, which is quantised; the loss needs its "
            "weights as they are. Add lm_head to quantization.llm_int8_skip_modules"
        )
    return head


def untie_head(model: PreTrainedModel) -> None:
    """Give the head a weight of its own, where it has that of the input embeddings."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if not config.tie_word_embeddings:
        return
    weight = head.weight
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    config.tie_word_embeddings = model.config.tie_word_embeddings = False


class LogitTransform(NamedTuple):
    """What a model does to the logits of its head."""

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        if self.soft_cap:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Read from the config, where architectures name it differently."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))  # Gemma


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """ConfigError where the logits are not `logit_transform` of a linear head."""
    head = linear_head(model)
    probe = torch.arange(1, 9, device=model.device)[None] % head.out_features
    positions = torch.arange(probe.shape[1], device=model.device)[None]
    was_training = model.training
    model.eval()
    expected = model(input_ids=probe, use_cache=False).logits[0].float()
    hidden = hidden_states(model, probe, positions, [probe.shape[1]])
    found = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    found = logit_transform(model)(found)
    model.train(was_training)
    error = (found - expected).abs().max().item()
    if error > 0.02 * max(1.0, expected.abs().max().item()):
        raise ConfigError(
            f"{type(model).__name__} does something to its logits after the linear head that the "
            f"fused loss does not know: they differ by {error:.3g}"
        )
