"""The student: loaded from a model directory, and saved as one."""

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.models.generation import keep_own, make_savable
from pipeline.models.head import untie_head
from pipeline.models.language_part import freeze_other_parts, lora_settings
from pipeline.models.processor import copy_processor
from pipeline.progress import say
from pipeline.training import fsdp
from pipeline.training.forward import add_distill_forward
from pipeline.training.output import DRAFT, FINAL
from pipeline.training.saved import TOKENS, check_reloaded, check_same, predict
from pipeline.training.trainer import DistillTrainer


def load_student(
    config: TrainConfig, folder: ModelFolder, args: TrainingArguments
) -> tuple[PreTrainedModel, torch.dtype]:
    """(the model to train, with the distilling forward; the dtype of its own weights)."""
    fsdp.load_on_one_rank(args)
    model = folder.load(config.dtype)
    make_savable(model)
    came_in = getattr(torch, folder.dtype())
    kept = freeze_other_parts(model)
    if kept and args.process_index == 0:
        say(f"only the language model is trained; kept as they are: {', '.join(kept)}")
    add_distill_forward(model, config.loss.direction)
    fsdp.agree_on_attention(model)
    set_seed(args.seed)  # the adapters' random start is the same on all ranks
    model = with_lora(model, config)
    if config.lora is not None and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model, came_in


def with_lora(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """The model with the adapters that the settings name, if any.

    Adapters of the input embeddings leave the head as it is, so a tied head is untied: merging them
    would change it too.
    """
    if config.lora is None:
        return model
    import peft

    try:
        settings = lora_settings(model, config.lora)
        lora = peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
        adapted: PreTrainedModel = peft.get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {error}") from error
    if type(model.get_input_embeddings()).__module__.startswith("peft"):
        untie_head(model)
    return adapted


def save_final(
    config: TrainConfig,
    trainer: DistillTrainer,
    base: ModelFolder,
    dtype: torch.dtype,
) -> None:
    """Save OUTPUT/model, a plain Hugging Face directory, in the dtype of the model's own weights.

    It has the class that the student had, a wrapper with its towers and processor files too. LoRA
    is merged. What was saved is loaded again, on the CPU, and must predict what was trained;
    only then does it become OUTPUT/model.
    `base` is the model that the student started from. All ranks must call this.
    Raises RefusedError where the saved model is another one.
    """
    args, output = trainer.args, trainer.output
    exact = not (args.bf16 or args.fp16 or args.tf32)
    exact &= {dtype, trainer.model.dtype} == {torch.float32}
    probe = torch.from_numpy(trainer.train_dataset[0].domain[:TOKENS].astype("int64"))
    with trainer.accelerator.autocast():
        trained = predict(trainer.model, probe)
    fsdp.reshard(trainer.model)
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = fsdp.gathered_state(trainer.accelerator, model) if trainer.is_fsdp_enabled else None
    if not args.should_save:
        return
    if state is not None:
        loaded = base.load(config.dtype)
        make_savable(loaded)
        model = with_lora(loaded, config)
        model.load_state_dict(state)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    check_same(trained, predict(model, probe), exact, "the merged student")
    output.remove(output.folder / DRAFT)
    draft = output.make(DRAFT)
    if "use_cache" not in config.training:  # transformers turns it off while it trains
        vars(model.config).pop("use_cache", None)
        if hasattr(base.config, "use_cache"):  # a wrapper has it in the text's config
            model.config.use_cache = base.config.use_cache
    model.to("cpu", dtype).save_pretrained(draft)
    keep_own(base.path, draft)
    trainer.processing_class.save_pretrained(draft)
    copy_processor(base.path, draft)
    check_reloaded(model, draft, probe, exact)
    output.replace(draft, output.folder / FINAL)
