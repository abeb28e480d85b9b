"""Whether a saved model is the one that was trained: both predict the same on a probe."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import RefusedError
from pipeline.models.directory import ModelFolder

TOKENS = 64
"""Length of the probe."""
EXACT = 1e-4
"""Nats of mean KL where everything is float32."""
ROUNDED = 0.02
"""The same elsewhere: weights that are merged or saved in bfloat16 are rounded themselves."""


@torch.no_grad()
def predict(model: PreTrainedModel, probe: Tensor) -> Tensor:
    """float32 [T, V] on the CPU: log-probabilities after each of the ids [T]."""
    model.eval()
    logits = model(input_ids=probe[None].to(model.device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1).cpu()


def mean_kl(expected: Tensor, found: Tensor) -> float:
    """Mean KL(expected ‖ found) in nats of predictions [T, V]."""
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def check_same(expected: Tensor, found: Tensor, exact: bool, what: str) -> None:
    """RefusedError where predictions [T, V] differ by more than computing them again does."""
    kl = mean_kl(expected, found)
    bound = EXACT if exact else ROUNDED
    if not kl <= bound:  # NaN is refused
        raise RefusedError(
            f"{what}: does not predict what the trained model does (mean KL {kl:.3g} nats over "
            f"{len(expected)} tokens, bound {bound:g}). It is not used as the result, and the "
            "checkpoints are kept. With LoRA, choose other lora.target_modules or modules_to_save"
        )


def check_reloaded(model: PreTrainedModel, folder: Path, probe: Tensor, exact: bool) -> None:
    """RefusedError where the model that a directory holds is not `model`. Loads it on the CPU."""
    reloaded = ModelFolder(folder).load("auto")
    check_same(predict(model, probe), predict(reloaded, probe), exact, str(folder))
