"""Training arguments that only fail when they are used: used once, on next to nothing.

Each probe costs milliseconds and comes before weights and corpora are read.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import fields

import torch
from accelerate.utils import DynamoBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler

from pipeline.errors import ConfigError
from pipeline.passed import reason

STEPS = 100  # of the schedule that is tried
NEED_THE_MODEL = ("params", "model", "optimizer_dict")  # arguments that the trainer adds


def check(args: TrainingArguments) -> None:
    """ConfigError, with the argument, for a value that the first step could not use."""
    for names, probe in PROBES.items():
        try:
            probe(args)
        except Exception as error:  # whatever the value makes torch and transformers do
            raise ConfigError(
                f"training.{given(args, names)}: cannot be used: {reason(error)}"
            ) from error


def given(args: TrainingArguments, names: str) -> str:
    """Those of the arguments that are not left at their defaults, with their values."""
    found = {name: getattr(args, name) for name in names.split()}
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    own = {name: value for name, value in found.items() if value != defaults[name]}
    # Of an enumeration, what is written in settings.
    return ", ".join(f"{k} {getattr(v, 'value', v)}" for k, v in (own or found).items())


def optimizer(args: TrainingArguments) -> None:
    without = copy(args)
    without.optim_args = None
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        _, others = Trainer.get_optimizer_cls_and_kwargs(without)
    except AttributeError:
        return  # the optimizer asks for the model, which is not there yet
    if args.optim_args and options == others:
        raise ValueError("optim_args change nothing of this optimizer; leave them out")
    if not options.keys() & set(NEED_THE_MODEL):
        kind([weight()], **options)


def schedule(args: TrainingArguments) -> None:
    get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([weight()], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(STEPS),
        num_training_steps=STEPS,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def checkpointing(args: TrainingArguments) -> None:
    if args.gradient_checkpointing_kwargs is not None:
        checkpoint(torch.neg, weight(), **args.gradient_checkpointing_kwargs)


def loader(args: TrainingArguments) -> None:
    workers = args.dataloader_num_workers
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
    )


def compiler(args: TrainingArguments) -> None:
    if args.torch_compile:
        backend = str(args.torch_compile_backend)
        DynamoBackend(backend.upper())
        torch.compile(torch.neg, backend=backend, mode=args.torch_compile_mode)


def levels(args: TrainingArguments) -> None:
    args.get_process_log_level()


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2, 2))


PROBES: dict[str, Callable[[TrainingArguments], None]] = {
    "optim optim_args learning_rate adam_beta1 adam_beta2 adam_epsilon": optimizer,
    "lr_scheduler_type lr_scheduler_kwargs": schedule,
    "gradient_checkpointing_kwargs": checkpointing,
    "dataloader_multiprocessing_context dataloader_persistent_workers": loader,
    "torch_compile_backend torch_compile_mode": compiler,
    "log_level log_level_replica": levels,
}
