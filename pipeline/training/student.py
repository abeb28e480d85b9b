"""The student: from a model directory to what is trained, and from that to a model directory."""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.models import directory as model_dir
from pipeline.training import fsdp
from pipeline.training.trainer import DistillTrainer, add_distill_forward


def load_student(
    config: TrainConfig, folder: Path, args: TrainingArguments
) -> tuple[PreTrainedModel, torch.dtype]:
    """(the model to train, with the distilling forward; the dtype it came in)."""
    fsdp.load_on_one_rank(args)
    model = model_dir.load_model(folder, config.dtype)
    came_in = getattr(torch, model_dir.own_dtype(model_dir.load_config(folder)))
    add_distill_forward(model, config.loss.direction)
    fsdp.agree_on_attention(model)
    set_seed(args.seed)  # adapters begin at random: each time the same, and the same on all ranks
    model = with_lora(model, config)
    if config.lora is not None and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model, came_in


def with_lora(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    if config.lora is None:
        return model
    import peft

    try:
        lora = peft.LoraConfig(**{"task_type": "CAUSAL_LM", **config.lora})
        adapted: PreTrainedModel = peft.get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {error}") from error
    return adapted


def save_final(
    config: TrainConfig, trainer: DistillTrainer, base: Path, dtype: torch.dtype, folder: Path
) -> None:
    """A plain Hugging Face directory: LoRA merged, in the dtype the student came in.

    `base` is the model that the student started from. All ranks must call it.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = fsdp.gathered_state(trainer.accelerator, model) if trainer.is_fsdp_enabled else None
    if not trainer.args.should_save:
        return
    if state is not None:
        model = with_lora(model_dir.load_model(base, config.dtype), config)
        model.load_state_dict(state)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    model.to(dtype).save_pretrained(draft)
    trainer.processing_class.save_pretrained(draft)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
