"""A student on quantised weights (QLoRA): what is refused, and its null test.

Its KL to the dump of its own base is the error of the quantisation, and not 0. So the null test
looks at the model as its files hold it, and then says what quantisation adds to that.
"""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, TrainingArguments

from pipeline.agreement import FAR, Answer
from pipeline.config import TrainConfig
from pipeline.data.mixing import GeneralStream
from pipeline.errors import ConfigError, RefusedError
from pipeline.models import quantization
from pipeline.models.directory import ModelFolder
from pipeline.progress import say
from pipeline.training import fsdp
from pipeline.training.forward import add_distill_forward
from pipeline.training.memory import free_bytes, free_on_machine, weights_dtype
from pipeline.training.null_test import measure
from pipeline.training.null_test import null_test as plain_test
from pipeline.training.trainer import DistillTrainer
from pipeline.types import Json

SPARE = 1.2
"""Memory that measuring a model takes, in sizes of its weights."""


def check(config: TrainConfig, args: TrainingArguments, folder: ModelFolder) -> None:
    """ConfigError for a quantization that cannot be loaded, or not be trained on."""
    if config.quantization is None:
        return
    if getattr(folder.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"quantization: {folder} is quantised already (quantization_config in its "
            "config.json); leave quantization out, or start from the model it was made from"
        )
    if fsdp.is_asked_for(args):
        raise ConfigError(
            "training.fsdp: quantised weights are not shared out; leave it or quantization out"
        )
    quantization.quantizer(config.quantization)


def null_test(
    config: TrainConfig,
    trainer: DistillTrainer,
    general: GeneralStream,
    folder: ModelFolder,
    weights: str,
) -> Json:
    """The null test of any student. That of a quantised one is of its unquantised weights: its
    "quantisation_kl" is the part of "kl" that quantisation adds, in nats.

    `folder` is the model that the student was loaded from, `weights` its fingerprint.
    Raises RefusedError as null_test.py does.
    """
    own = general.dumps[0].plan["teacher"]["fingerprint"] == weights
    if config.quantization is None or not own:
        return plain_test(config, trainer, general, folder, weights)
    rows = min(
        config.null_test.batches * trainer.args.train_batch_size, sum(map(len, general.dumps))
    )
    found = measure(trainer, general, rows).mean
    if not math.isfinite(found):
        raise ConfigError(
            f"quantization: the KL of the untrained student to the dump is {found}: its "
            "computation overflows. Set another bnb_4bit_compute_dtype, such as bfloat16"
        )
    device = place_of(config, trainer.args, folder)
    if device is None:
        return within_wide_bound(found)
    with unquantised(config, trainer, folder, device):
        plain = plain_test(config, trainer, general, folder, weights)
    say(
        f"null test: that was the unquantised model. Quantised, the student starts at {found:.3g} "
        f"nats: quantisation costs {found - plain['kl']:.3g}"
    )
    return {**plain, "kl": found, "quantisation_kl": found - plain["kl"]}


def within_wide_bound(found: float) -> Json:
    words = (
        f"null test: the quantised student starts at {found:.3g} nats. Its unquantised weights do "
        f"not fit into memory beside it, so the bound is wide: {FAR:g} nats"
    )
    if not abs(found) <= FAR:
        raise RefusedError(
            f"{words}. The dump is {Answer.OTHER}'s, or the quantisation is too coarse. Free some "
            "memory to tell them apart, or try without quantization"
        )
    say(f"{words}. It tells another model, and not a model that is computed differently")
    return {"kl": found, "answer": None, "quantisation_kl": None}


def place_of(config: TrainConfig, args: TrainingArguments, folder: ModelFolder) -> str | None:
    """The device that the unquantised weights fit on beside the student; None for none."""
    dtype = weights_dtype(config, folder)
    need = int(SPARE * dtype.itemsize * folder.empty(dtype).num_parameters())
    free = {str(args.device): free_bytes(args)}
    free.setdefault("cpu", free_on_machine())
    return next((device for device, size in free.items() if need <= size), None)


@contextmanager
def unquantised(
    config: TrainConfig, trainer: DistillTrainer, folder: ModelFolder, device: str
) -> Iterator[None]:
    """Let the trainer measure the model as its files hold it; it is freed afterwards."""
    student = trainer.model
    trainer.model = plain_model(config, folder, device)
    try:
        yield
    finally:
        trainer.model = student
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def plain_model(config: TrainConfig, folder: ModelFolder, device: str) -> PreTrainedModel:
    model = folder.load(config.dtype).to(device)
    add_distill_forward(model, config.loss.direction)
    return model
