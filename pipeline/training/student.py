"""The student: loaded from a model directory, and saved as one."""

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.training import fsdp
from pipeline.training.forward import add_distill_forward
from pipeline.training.output import DRAFT, FINAL
from pipeline.training.trainer import DistillTrainer


def load_student(
    config: TrainConfig, folder: ModelFolder, args: TrainingArguments
) -> tuple[PreTrainedModel, torch.dtype]:
    """(the model to train, with the distilling forward; the dtype of its own weights)."""
    fsdp.load_on_one_rank(args)
    model = folder.load(config.dtype)
    came_in = getattr(torch, folder.dtype())
    add_distill_forward(model, config.loss.direction)
    fsdp.agree_on_attention(model)
    set_seed(args.seed)  # the adapters' random start is the same on all ranks
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
    config: TrainConfig,
    trainer: DistillTrainer,
    base: ModelFolder,
    dtype: torch.dtype,
) -> None:
    """Save OUTPUT/model, a plain Hugging Face directory, in the dtype of the model's own weights.

    LoRA is merged.
    `base` is the model that the student started from. All ranks must call this.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = fsdp.gathered_state(trainer.accelerator, model) if trainer.is_fsdp_enabled else None
    if not trainer.args.should_save:
        return
    if state is not None:
        model = with_lora(base.load(config.dtype), config)
        model.load_state_dict(state)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    output = trainer.output
    output.remove(output.folder / DRAFT)
    draft = output.make(DRAFT)
    model.to(dtype).save_pretrained(draft)
    trainer.processing_class.save_pretrained(draft)
    output.replace(draft, output.folder / FINAL)
