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

from pipeline.config import TrainConfig
from pipeline.data.mixing import GeneralStream
from pipeline.errors import ConfigError, RefusedError
from pipeline.models import quantization
from pipeline.models.directory import ModelFolder
from pipeline.progress import say
from pipeline.training import fsdp
from pipeline.training.forward import add_distill_forward
from pipeline.training.memory import free_bytes, free_on_machine, weights_dtype
from pipeline.training.null_test import mean_kl, null_test, sample_gap
from pipeline.training.trainer import DistillTrainer
from pipeline.types import Json

WIDE = 0.5
"""Nats of mean KL of a quantised student whose unquantised weights do not fit into memory. 4 bit
costs the tests' random model 0.05."""
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
            "training.fsdp: quantised weights are not shared out; leave it out, and each rank "
            "holds all of them (accelerate launch without FSDP), or leave quantization out"
        )
    quantization.quantizer(config.quantization)


def null_test_of(
    config: TrainConfig,
    trainer: DistillTrainer,
    general: GeneralStream,
    weights: str,
    folder: ModelFolder,
) -> Json:
    """{"null_test_kl": KL in nats of the untrained student}, and for a quantised one
    "quantisation_kl", the part of it that quantisation adds.

    `folder` is the model that the student was loaded from, `weights` its fingerprint. Where they
    are the teacher's, the null test of the unquantised weights decides.
    Raises RefusedError as `null_test` does.
    """
    own = general.dumps[0].plan["teacher"]["fingerprint"] == weights
    if config.quantization is None or not own:
        return {"null_test_kl": null_test(config, trainer, general, weights)}
    found = kl_of_student(config, trainer, general)
    if not math.isfinite(found):
        raise ConfigError(
            f"quantization: the KL of the untrained student to the dump is {found}: its "
            "computation overflows. Set another bnb_4bit_compute_dtype, such as bfloat16"
        )
    device = place_of(config, trainer.args, folder)
    if device is None:
        return {"null_test_kl": within_wide_bound(found), "quantisation_kl": None}
    with unquantised(config, trainer, folder, device):
        plain = null_test(config, trainer, general, weights)
    say(
        f"null test: that was the unquantised model. Quantised, the student starts at {found:.3g} "
        f"nats: quantisation costs {found - plain:.3g}"
    )
    return {"null_test_kl": found, "quantisation_kl": found - plain}


def kl_of_student(config: TrainConfig, trainer: DistillTrainer, general: GeneralStream) -> float:
    """Mean KL in nats to the dump over the rows of the null test; to samples, `sample_gap`."""
    size = trainer.args.train_batch_size
    rows = min(config.null_test.batches * size, sum(map(len, general.dumps)))
    if general.dumps[0].plan["k"] == 0:
        return sample_gap(trainer, general, rows)[0]
    return mean_kl(trainer, general, rows, size)


def within_wide_bound(found: float) -> float:
    words = (
        f"null test: the quantised student starts at {found:.3g} nats. Its unquantised weights do "
        f"not fit into memory beside it, so the bound is wide: {WIDE:g} nats"
    )
    if not abs(found) <= WIDE:
        raise RefusedError(
            f"{words}. The dump is another model's, or the quantisation is too coarse. Free some "
            "memory to tell them apart, or try without quantization"
        )
    say(f"{words}. It tells another model, and not a model that is computed differently")
    return found


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
