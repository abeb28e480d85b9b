"""The distilling forward: a causal LM returns the loss of a packed row instead of logits."""

from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from pipeline.losses import Direction, linear_sparse_divergence
from pipeline.models.attention import Way, enable_packing, take_way, way_of
from pipeline.models.head import LogitTransform, hidden_states, linear_head, logit_transform
from pipeline.training import fsdp


def add_distill_forward(model: PreTrainedModel, direction: Direction) -> None:
    """Give the model's forward a second way, taken for a `PackedRow`: one with `targets`.

    It returns {"loss", "losses"} of `linear_sparse_divergence`; the logits never exist as a whole.
    The loss is inside the forward, not around it, so that whatever wraps the model (FSDP's gathered
    head, DDP, autocast, gradient checkpointing, peft) holds for the loss too.
    Raises ConfigError for a model whose logits are not a linear head on its decoder, scaled and
    soft-capped at most, or that cannot keep packed sequences apart.
    """
    way, transform = fsdp.on_first_rank(lambda: learnt(model))
    take_way(model, way)
    plain_forward = model.forward

    def forward(self: PreTrainedModel, *args: Any, targets: Any = None, **kwargs: Any) -> Any:
        if targets is None:
            return plain_forward(*args, **kwargs)
        hidden = hidden_states(
            self, kwargs["input_ids"], kwargs["position_ids"], kwargs["sequence_lengths"]
        )
        head = linear_head(self)
        loss, losses = linear_sparse_divergence(
            hidden.index_select(0, targets["rows"]),
            head.weight,
            targets["ids"],
            targets["logprobs"],
            targets["tail_logprob"],
            direction,
            labels=targets["labels"],
            row_weights=targets["row_weights"],
            bias=head.bias,
            logit_scale=transform.scale,
            soft_cap=transform.soft_cap,
        )
        return {"loss": loss, "losses": losses}

    model.forward = MethodType(forward, model)


def learnt(model: PreTrainedModel) -> tuple[Way, LogitTransform]:
    """How the model keeps packed sequences apart, and what it does to its head's logits."""
    enable_packing(model)
    return way_of(model), logit_transform(model)
