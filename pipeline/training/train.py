"""Stage two: a domain corpus and a dump on disk -> a student. No teacher is in memory."""

import atexit
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import distributed
from transformers import TrainingArguments

from pipeline.config import TrainConfig
from pipeline.data.mixing import MixedDataset
from pipeline.data.packing import collate
from pipeline.errors import Interrupted
from pipeline.json_files import read_object, write_json
from pipeline.models import own_rows
from pipeline.models.attention import way_of
from pipeline.models.directory import WEIGHTS
from pipeline.places import check_output, inputs_of
from pipeline.progress import say
from pipeline.signals import stop_on_signals
from pipeline.training import memory, quantised
from pipeline.training.arguments import check_dtype, items_per_step, training_arguments
from pipeline.training.disk import writing
from pipeline.training.identity import make_identity
from pipeline.training.inputs import Inputs, check
from pipeline.training.lock import hold
from pipeline.training.output import FINAL, SUMMARY, Output
from pipeline.training.quantised import null_test
from pipeline.training.student import load_student, save_final
from pipeline.training.trainer import DistillTrainer
from pipeline.types import Json

FIRST = 8
"""Batches from which the share of padding is taken."""


def run(config: TrainConfig, trainer_class: Callable[..., DistillTrainer] = DistillTrainer) -> Json:
    """Train the student in config.output, or resume it; returns the summary that it also writes.

    A study's control arms bring a trainer class of their own.
    Raises ConfigError, RefusedError (the student does not belong to the dump, or the directory
    holds another run), StorageError, Interrupted (a checkpoint was saved).
    """
    config = replace(config, output=str(Path(config.output).expanduser()))
    inputs = Inputs(config)
    check(inputs)
    check_output(config.output, {**dict(inputs_of(config)), "model": str(inputs.model.path)})
    args = training_arguments(config)
    quantised.check(config, args, inputs.model)
    if config.quantization is None:  # what is not quantised becomes float32 there
        check_dtype(args, inputs.model.dtype(config.dtype))
    with writing(Path(config.output)), hold(Path(config.output)):
        identity = make_identity(inputs, args)
        summary = finished(Path(config.output), identity)
        return summary or train(inputs, args, identity, trainer_class)


def finished(output: Path, identity: Json) -> Json | None:
    """The summary of a finished run; None where there is something left to do.

    Raises RefusedError where the directory holds something that this run did not make.
    """
    summary = read_object(output / SUMMARY)
    if summary is not None and "identity" in summary:
        Output(output, identity).refuse_other(output, summary["identity"])
        if any(path for pattern in WEIGHTS for path in (output / FINAL).glob(pattern)):
            say(f"{output}: nothing left to do; the student is in {output / FINAL}")
            return summary
        say(f"{output}: the run was finished, but {output / FINAL} is gone; making it again")
    Output(output, identity).check()
    return None


def train(
    inputs: Inputs,
    args: TrainingArguments,
    identity: Json,
    trainer_class: Callable[..., DistillTrainer],
) -> Json:
    """Train from the last checkpoint, or from the start; save the student and the summary."""
    config, output = inputs.config, Path(inputs.config.output)
    dataset = mixed_dataset(inputs, args)
    texts = inputs.held_out()
    say(describe(inputs, dataset, items_per_step(args)))
    rows = first_rows(dataset, args, config.row_tokens)
    tokens, share = inputs.row_tokens(args, dataset.rows_an_item), inputs.target_share
    memory.check(config, args, inputs.model, tokens, rows, share)
    trainer: DistillTrainer | None = None

    def ask(name: str) -> bool:
        if trainer is None or not trainer.run_log.begun:
            return False  # nothing to save yet
        say(f"{name}: saving a checkpoint after this step")
        trainer.stop_asked = True
        return True

    with stop_on_signals(ask):
        student, dtype = load_student(config, inputs.model, args)
        if way_of(student).own_rows and args.process_index == 0:
            say(own_rows.cost(student, own_rows.padding(rows)))
        trainer = trainer_class(
            student,
            args,
            dataset,
            config.loss,
            row_tokens=config.row_tokens,
            vocab_size=inputs.model.vocab_size,
            held_out=texts,
            held_out_dump=inputs.held_out_dump,
            held_out_rows=config.held_out.dump_limit,
            gradient_cosine_steps=config.gradient_cosine_steps,
            identity=identity,
            processing_class=inputs.model.tokenizer,
        )
        checkpoint = trainer.resume_point()
        if checkpoint is not None:
            say(f"{output}: resuming from {checkpoint.name}")
        if dataset.general is not None and checkpoint is None and config.null_test.batches:
            trainer.before_training = partial(
                null_test, config, trainer, dataset.general, inputs.model, identity["model"]
            )
        began = time.monotonic()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            trainer.run_log.close()
        if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(f"stopped by a signal after step {trainer.state.global_step}")
        trainer.check_finite()
    summary = {
        **last_logged(trainer.state.log_history),
        "steps": trainer.state.global_step,
        "best": best_checkpoint(trainer),
        "null_test_kl": trainer.null_test["kl"] if trainer.null_test else None,
        "null_test": trainer.null_test,
        "seconds": time.monotonic() - began,
        "identity": identity,
    }
    summary |= save_final(config, trainer, inputs.model, dtype)
    if trainer.args.should_save:
        write_json(output / SUMMARY, summary)
        best = summary["best"]
        which = f", that of {best['checkpoint']}" if best else ""
        say(f"{output}: the student is in {output / FINAL}{which}")
    return summary


def mixed_dataset(inputs: Inputs, args: TrainingArguments) -> MixedDataset:
    config = inputs.config
    seed = args.seed if args.data_seed is None else args.data_seed
    return MixedDataset(
        inputs.domain, inputs.general(seed), config.mix, seed, items_per_step(args), config.mix_by
    )


def first_rows(
    dataset: MixedDataset, args: TrainingArguments, row_tokens: int | None
) -> list[list[int]]:
    """The lengths of the sequences in each packed row of a few batches."""
    size = args.train_batch_size
    starts = range(0, min(len(dataset), FIRST * size), size)
    batches = [[dataset[at] for at in range(start, start + size)] for start in starts]
    rows = [row for batch in batches for row in collate(batch, row_tokens)["packed"]]
    return [row["sequence_lengths"] for row in rows]


def describe(inputs: Inputs, dataset: MixedDataset, per_step: int) -> str:
    """One line on what the run reads."""
    config, domain = inputs.config, inputs.domain
    parts = [
        f"{len(domain):,} domain sequences ({of_targets(domain.token_count, domain.target_count)})"
    ]
    for dump in inputs.dumps:
        counts = int(dump.lengths.sum()), int(dump.target_counts.sum())
        parts.append(f"{len(dump):,} general ones ({of_targets(*counts)})")
    if inputs.dumps:
        parts.append(f"{dataset.mix:g} to 1 by {config.mix_by}")
    parts.append(f"{per_step} domain sequences in a step")
    return f"{config.output}: {', '.join(parts)}"


def of_targets(tokens: int, targets: int) -> str:
    """The number of tokens, and of targets where some tokens are none."""
    return f"{tokens:,} tokens" + (f", {targets:,} of them targets" if targets < tokens else "")


def leave(code: int) -> None:
    """End this process, where it is one of several ranks, without finalising the interpreter.

    Threads of a process group may still free tensors, and abort the process when the interpreter
    is gone. Exit handlers run (reporters' last uploads).
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def last_logged(history: list[Json]) -> Json:
    """The last value of each logged quantity."""
    names = ["loss", "ce", "kl", "teacher_tail", "domain_tokens", "general_tokens"]
    names += ["tokens_per_s", "wait_share"]
    found: Json = {}
    for line in history:
        found |= {
            name: value for name, value in line.items() if name in names or name.startswith("eval_")
        }
    return found


def best_checkpoint(trainer: DistillTrainer) -> Json | None:
    """Which checkpoint the student is, where training.load_best_model_at_end asks for the best."""
    state, args = trainer.state, trainer.args
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    checkpoint = Path(state.best_model_checkpoint).name
    step = int(checkpoint.split("-")[1])
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    values = [line[metric] for line in state.log_history if line["step"] == step and metric in line]
    return {"checkpoint": checkpoint, "step": step, metric: values[-1]}
