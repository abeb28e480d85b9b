"""transformers.TrainingArguments from the settings: the user's own, over suitable defaults."""

import difflib
import inspect
import os
from copy import deepcopy
from functools import partial
from typing import get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from pipeline.config import HeldOutConfig, TrainConfig, held_out_texts
from pipeline.errors import ConfigError
from pipeline.passed import blamed, typed
from pipeline.training import fsdp, probes
from pipeline.training.argument_table import FIXED, REFUSED
from pipeline.types import Json

DOCUMENTED = {"fsdp": bool | str | list[str] | None}
"""Types of arguments that take more than they declare."""
GENERAL_KL = "general_kl"


def items_per_step(args: TrainingArguments) -> int:
    """Domain sequences in an optimizer step, over all micro-batches and ranks."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def metrics_of(held_out: HeldOutConfig) -> list[str]:
    """Names of what evaluation during training measures."""
    perplexities = [f"eval_{kind}_perplexity" for kind, _ in held_out_texts(held_out)]
    return perplexities + [f"eval_{GENERAL_KL}"] * (held_out.dump is not None)


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Raises ConfigError for a name or value that transformers lacks or this trainer cannot use."""
    fixed: Json = {
        "output_dir": config.output,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would wait for the device at each micro-step
    }
    check_names(config)
    given = typed_values(config.training)
    try:
        args = TrainingArguments(**deepcopy({**defaults(config), **given, **fixed}))
    except (TypeError, ValueError, ImportError) as error:
        name = blamed(partial(TrainingArguments, **fixed), given)
        raise ConfigError(f"training{name}: {error}") from error
    take_launched_precision(args)
    check_evaluation(args, metrics_of(config.held_out))
    probes.check(args)
    check_reporters(args)
    check_processes(args)
    return args


def typed_values(given: Json) -> Json:
    """The arguments as transformers declares them."""
    hints = {**get_type_hints(TrainingArguments), **DOCUMENTED}
    found = {}
    for name, value in given.items():
        # YAML reads a bare `no` as false.
        value = "no" if value is False and name.endswith("_strategy") else value
        found[name] = typed(f"training.{name}", value, hints[name])
    return found


def defaults(config: TrainConfig) -> Json:
    cuda = torch.cuda.is_available()
    dumps = [config.dump] if isinstance(config.dump, str) else list(config.dump or ())
    waits = cuda or any("://" in dump for dump in dumps)  # workers then read steps ahead
    return {
        "use_cpu": not torch.accelerator.is_available(),  # several ranks then talk through gloo
        "logging_steps": 10,
        "report_to": "tensorboard",
        "dataloader_pin_memory": cuda,
        "accelerator_config": {"non_blocking": cuda},  # a batch is copied while others are computed
        "dataloader_num_workers": 2 if waits else 0,
        "eval_strategy": "epoch" if metrics_of(config.held_out) else "no",
        "greater_is_better": False,  # perplexities and KL
    }


def check_names(config: TrainConfig) -> None:
    """ConfigError for a name that transformers does not know, that this script sets itself, or
    that would have no effect."""
    known = inspect.signature(TrainingArguments).parameters
    for name, value in config.training.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ConfigError(
                f"training.{name}: no such argument of transformers.TrainingArguments"
                + (f"; did you mean {close[0]}?" if close else "")
            )
        if name in FIXED:
            raise ConfigError(f"training.{name}: is set by this script: {FIXED[name]}")
        # The default may be a factory, of something empty.
        if name in REFUSED and value != known[name].default and value not in ([], {}):
            raise ConfigError(f"training.{name}: cannot be {value!r} here: {REFUSED[name]}")


def check_evaluation(args: TrainingArguments, metrics: list[str]) -> None:
    """ConfigError for an evaluation without text, and for a best model by another metric."""
    if args.eval_strategy != "no" and not metrics:
        raise ConfigError(
            "training.eval_strategy: there is nothing to evaluate on; give held_out.domain.path, "
            "held_out.general.path, held_out.other.path or held_out.dump"
        )
    best = args.metric_for_best_model
    if best is not None and f"eval_{best.removeprefix('eval_')}" not in metrics:
        choices = f"choose from {', '.join(metrics)}" if metrics else "give held_out.domain.path"
        raise ConfigError(
            f"training.metric_for_best_model {best}: nothing of that name is measured; {choices}"
        )


def check_reporters(args: TrainingArguments) -> None:
    missing = set(args.report_to) - set(get_available_reporting_integrations()) - {"flyte"}
    if missing:
        name = min(missing)
        raise ConfigError(
            f"training.report_to {name}: the package is not installed; `pip install {name}`, or "
            "choose tensorboard or none. metrics.jsonl is written in any case"
        )


def take_launched_precision(args: TrainingArguments) -> None:
    """bf16 of `accelerate launch --mixed_precision bf16` as if it was set here.

    Raises ConfigError for another precision than that and "no".
    """
    if args.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"`accelerate launch --mixed_precision {args.mixed_precision}`: expected bf16 or no; "
            "the gradients of the loss would underflow"
        )
    args.bf16 = args.mixed_precision == "bf16"


def check_dtype(args: TrainingArguments, dtype: str) -> None:
    """ConfigError where a student with weights of `dtype` would compute the loss in float16."""
    if dtype == "float16" and not args.bf16:
        raise ConfigError(
            "dtype auto: the model's own is float16, in which the gradients of the loss underflow; "
            "set dtype: float32 or training.bf16: true"
        )


def check_processes(args: TrainingArguments) -> None:
    """ConfigError where ranks, GPUs and FSDP do not fit each other.

    Called before an Accelerator is made: one that was asked for FSDP sets it for the whole process.
    """
    if args.torch_compile and fsdp.is_asked_for(args):
        raise ConfigError(
            "training.torch_compile does not work with FSDP here; leave one of them out"
        )
    if fsdp.is_asked_for(args) and args.world_size == 1:
        raise ConfigError(
            "training.fsdp: one process cannot share the model out; start several with "
            "`accelerate launch --num_processes N`, or leave it out"
        )
    if args.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} ranks were started, but they do not find each other; "
            "start with `accelerate launch` or `torchrun`, one rank for each GPU"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible to one process; start with `accelerate launch "
            "scripts/train_student.py ...`, or set CUDA_VISIBLE_DEVICES to one"
        )
