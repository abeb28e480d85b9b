"""The student: loaded from a model directory, and saved as one."""

from functools import partial

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.models.generation import keep_own, make_savable
from pipeline.models.head import untie_head
from pipeline.models.language_part import freeze_other_parts, lora_settings
from pipeline.models.processor import copy_processor
from pipeline.passed import blamed, reason
from pipeline.progress import say
from pipeline.training import fsdp
from pipeline.training.forward import add_distill_forward
from pipeline.training.output import ADAPTER, DRAFT, FINAL, Output
from pipeline.training.saved import TOKENS, check_reloaded, check_same, mean_kl, predict
from pipeline.training.trainer import DistillTrainer
from pipeline.types import Json


def load_student(
    config: TrainConfig, folder: ModelFolder, args: TrainingArguments
) -> tuple[PreTrainedModel, torch.dtype]:
    """(the model to train, with the distilling forward; the dtype of its own weights)."""
    fsdp.load_on_one_rank(args)
    model = folder.load(config.dtype, config.quantization, str(args.device))
    make_savable(model)
    came_in = getattr(torch, folder.dtype())
    kept = freeze_other_parts(model)
    if kept and args.process_index == 0:
        say(f"only the language model is trained; kept as they are: {', '.join(kept)}")
    add_distill_forward(model, config.loss.direction)
    set_seed(args.seed)  # the adapters' random start is the same on all ranks
    model = with_lora(model, config) if config.quantization is None else with_qlora(model, config)
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

    kind = partial(peft.LoraConfig, task_type="CAUSAL_LM")
    try:
        lora = kind(**lora_settings(model, config.lora))
        adapted: PreTrainedModel = peft.get_peft_model(model, lora)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the values make peft do
        raise ConfigError(f"lora{blamed(kind, config.lora)}: {reason(error)}") from error
    if type(model.get_input_embeddings()).__module__.startswith("peft"):
        untie_head(model)
    return adapted


def with_qlora(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """`with_lora` for quantised weights. What is not quantised becomes float32 (peft).

    Raises ConfigError for adapters whose start changes the weights below them: those are merged
    into the unquantised weights when the run ends, which would lack the change.
    """
    import peft

    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    before = {weight.data_ptr(): weight.data for weight in model.parameters()}
    adapted = with_lora(model, config)
    if before.keys() - {weight.data_ptr() for weight in adapted.parameters()}:
        raise ConfigError(
            f"lora.init_lora_weights: {(config.lora or {}).get('init_lora_weights')} changes the "
            "base's own weights, which are quantised here; leave it out"
        )
    return adapted


def save_final(
    config: TrainConfig,
    trainer: DistillTrainer,
    base: ModelFolder,
    dtype: torch.dtype,
) -> Json:
    """Save OUTPUT/model, a plain Hugging Face directory, in the dtype of the model's own weights.

    It has the class that the student had, a wrapper with its towers and processor files too. LoRA
    is merged, that of a quantised base into the unquantised one. What was saved is loaded again, on
    the CPU, and must predict what was trained; only then does it become OUTPUT/model.
    `base` is the model that the student started from. All ranks must call this.
    Returns what a quantised student adds to the summary: {"merged_kl": KL in nats of
    the quantised student to the merged one, over the probe}.
    Raises RefusedError where the saved model is another one.
    """
    args, output, found = trainer.args, trainer.output, {}
    exact = not (args.bf16 or args.tf32)
    probe = torch.from_numpy(trainer.train_dataset[0].domain.input_ids[:TOKENS].astype("int64"))
    with trainer.accelerator.autocast():
        trained = predict(trainer.model, probe)
    fsdp.reshard(trainer.model)
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = fsdp.gathered_state(trainer.accelerator, model) if trainer.is_fsdp_enabled else None
    if not args.should_save:
        return {}
    if state is not None:
        loaded = base.load(config.dtype)
        make_savable(loaded)
        model = with_lora(loaded, config)
        model.load_state_dict(state)
    if config.quantization is not None:
        save_adapter(model, output)
        model = unquantised(model, config, base)
        plain = predict(model, probe)
        found["merged_kl"] = kl = mean_kl(trained, plain)
        say(
            f"{output.folder}: the adapters are in {output.folder / ADAPTER}. Merged into the "
            f"unquantised weights, the student differs by {kl:.3g} nats from the quantised one"
        )
        trained = plain
    exact &= {dtype, model.dtype} == {torch.float32}
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
    return found


def save_adapter(model: PreTrainedModel, output: Output) -> None:
    """Save OUTPUT/adapter, in peft's format: with the quantised base it is what was trained."""
    output.remove(output.folder / ADAPTER)
    model.save_pretrained(output.make(ADAPTER), save_embedding_layers=False)


def unquantised(model: PreTrainedModel, config: TrainConfig, base: ModelFolder) -> PreTrainedModel:
    """The trained adapters of a quantised model on the unquantised weights of its base, on the CPU.

    Merging into the quantised weights would round the adapters to 4 bit with them.
    """
    state = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loaded = base.load(config.dtype)
    make_savable(loaded)
    adapted = with_lora(loaded, config)
    expected = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert state.keys() == expected, state.keys() ^ expected
    adapted.load_state_dict(state, strict=False)
    return adapted
