"""The head behind a causal language model's logits, and the hidden states in front of it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.models.attention import difference, packing_arguments
from pipeline.models.decoder import decoder_of
from pipeline.models.packed_attention import told_apart

SMALL, LARGE = 2.0**-10, 2.0**60
"""Where the scale and the cap are taken; every dtype but float16 holds both exactly."""
LARGE_HALF = 2.0**15
POINTS = (0.0, 0.5, -3.0, 20.0, -70.0, 1024.0)
"""Other outputs of the head at which the model is asked what it makes of them."""
ROUNDING = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative error of a product with the head's weight; elsewhere EXACT."""
EXACT = 1e-4
"""Relative error of float32 operations on them: a scale, a tanh."""

LORA = ". With LoRA, leave lm_head out of lora.target_modules and lora.modules_to_save"


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, sequence_lengths: list[int]
) -> Tensor:
    """[T, D]: the decoder's last hidden states of a packed row.

    input_ids, position_ids  int64 [1, T]
    sequence_lengths         tokens of each sequence of the row
    """
    packing = packing_arguments(model, sequence_lengths)
    with told_apart() if packing else nullcontext():
        hidden: Tensor = decoder_of(model)(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,  # with a cache, packed sequences would see each other
            **packing,
        ).last_hidden_state[0]
    return hidden


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The output embeddings; ConfigError where they are not a plain linear layer."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).__module__.startswith("peft"):
        raise ConfigError(
            f"the model's head is a {type(head).__name__}; a plain linear layer is needed"
            + (LORA if head is not None and type(head).__module__.startswith("peft") else "")
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
    """also that of the hidden states in front of the head"""
    soft_cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        if self.soft_cap:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits


@torch.no_grad()
def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Learnt from the model, whatever its settings are called.

    Chosen outputs of the head give the scale and the cap; the head's input, compared with the
    decoder's output, gives a factor of the hidden states. Raises ConfigError for a model whose
    logits are not a linear head on its decoder, scaled and soft-capped at most.
    """
    head, decoder = linear_head(model), decoder_of(model)
    was_training = model.training
    model.eval()
    try:
        found = LogitTransform(*scale_and_cap(model, head))
        with seen(decoder, head) as seen_now:
            expected = probe(model)
        hidden, entered = (seen_now.get(name) for name in ("hidden", "entered"))
        if hidden is None:
            raise unknown(model, "the decoder has no last_hidden_state")
        if entered is not None:
            factor = factor_between(model, hidden, entered)
            if factor != 1 and head.bias is not None:
                raise unknown(model, f"the head has a bias, and its input is scaled by {factor:g}")
            found = found._replace(scale=found.scale * factor)
        check_logits(model, head, found, hidden, expected)
    finally:
        model.train(was_training)
    return found


def scale_and_cap(model: PreTrainedModel, head: nn.Linear) -> tuple[float, float | None]:
    """(scale, soft cap or None) of the logits, from what the model makes of chosen numbers.

    Each row of the head's output has one of the points in all columns, and the last two are mixed,
    so columns that differ or depend on each other are found.
    """
    large = LARGE_HALF if model.dtype == torch.float16 else LARGE
    points = torch.tensor([SMALL, large, -large, *POINTS], device=model.device)
    rows = points[:, None].expand(-1, head.out_features)
    mixed = torch.linspace(-30, 30, head.out_features, device=model.device)
    given = torch.cat([rows, mixed[None], mixed.flip(0)[None]])
    hook = head.register_forward_hook(lambda *_: given[None])
    try:
        found = probe(model, len(given))
    finally:
        hook.remove()
    if head.out_features != found.shape[1]:
        raise unknown(model, f"the head has {head.out_features} columns, not {found.shape[1]}")
    exact, found = max(EXACT, 2 * torch.finfo(found.dtype).eps), found.double()
    scale, most = found[0, 0].item() / SMALL, found[1, 0].item()
    cap = None if abs(most - scale * large) <= exact * abs(most) else abs(most)
    transform = LogitTransform(rounded(scale), None if cap is None else rounded(cap))
    expected = transform(given.double())
    wrong = (found - expected).abs() > exact * expected.abs().clamp(min=abs(scale) * SMALL)
    if scale == 0 or not found.isfinite().all() or wrong.any():
        row, column = wrong.nonzero()[0].tolist() if wrong.any() else (0, 0)
        raise unknown(
            model,
            f"{given[row, column]:g} in the head's column {column} becomes "
            f"{found[row, column]:g}, and a scale and a soft cap would make it "
            f"{expected[row, column]:g}",
        )
    return transform


def rounded(value: float) -> float:
    """The number without the float32 noise of its measurement: 6 digits."""
    return float(f"{value:.6g}")


def rounding(model: PreTrainedModel) -> float:
    return ROUNDING.get(model.dtype, EXACT)


def factor_between(model: PreTrainedModel, hidden: Tensor, entered: Tensor) -> float:
    """By which number the decoder's states [T, D] are multiplied before they enter the head."""
    if torch.equal(hidden, entered):
        return 1.0
    hidden, entered = hidden.double(), entered.double()
    factor = float((hidden * entered).sum() / hidden.square().sum())
    if not (entered - factor * hidden).norm() <= rounding(model) * entered.norm():
        raise unknown(model, "the hidden states are more than scaled on their way to the head")
    return rounded(factor)


def check_logits(
    model: PreTrainedModel,
    head: nn.Linear,
    transform: LogitTransform,
    hidden: Tensor,
    expected: Tensor,
) -> None:
    """ConfigError where logits [T, V] are not `transform` of the head on the states [T, D].

    Logits that are not finite say nothing.
    """
    if not expected.isfinite().all():
        return
    states = hidden.to(head.weight.dtype)
    found = transform(nn.functional.linear(states, head.weight, head.bias).double())
    off = (found - expected.double()).abs().max().item()
    largest = max(1.0, expected.abs().max().item())  # a constant in all logits counts, too
    same = off <= rounding(model) * largest
    if not same or (off and difference(found, expected.double()) > rounding(model)):
        raise unknown(model, f"they differ from those of the linear head by {off:.3g}")


def unknown(model: PreTrainedModel, what: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} does something to its logits that the fused loss does not know: "
        f"{what}"
    )


@contextmanager
def seen(decoder: nn.Module, head: nn.Linear) -> Iterator[dict[str, Tensor]]:
    """{"hidden": the decoder's states [T, D], "entered": what goes into the head}, after a forward;
    "entered" is missing where the model uses the head's weight in another way."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, inputs: Any, output: Any = None) -> None:
        value = inputs[0] if output is None else getattr(output, "last_hidden_state", None)
        if value is not None:
            found[name] = value[0]

    hooks = [
        decoder.register_forward_hook(partial(keep, "hidden")),
        head.register_forward_pre_hook(partial(keep, "entered")),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def probe(model: PreTrainedModel, tokens: int = 8) -> Tensor:
    """Logits [T, V] after a few ids."""
    ids = torch.arange(1, tokens + 1, device=model.device)[None]
    ids = ids % model.get_input_embeddings().num_embeddings
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits
