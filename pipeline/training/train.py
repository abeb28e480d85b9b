"""Stage two: a domain corpus and a dump on disk -> a student. No teacher is in memory."""

import atexit
import difflib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import distributed
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from pipeline.config import HeldOutConfig, TrainConfig, held_out_texts
from pipeline.corpus import Corpus, TokenSequences, held_out
from pipeline.data.mixing import GeneralStream, MixedDataset
from pipeline.errors import ConfigError, Interrupted, RefusedError
from pipeline.models import directory as model_dir
from pipeline.progress import say
from pipeline.signals import stop_on_signals
from pipeline.training import fsdp, memory
from pipeline.training.null_test import null_test
from pipeline.training.student import load_student, save_final
from pipeline.training.trainer import GENERAL_KL, DistillTrainer, items_per_step
from pipeline.types import Json
from storage import LogitDataset
from storage.manifest import differences

Dumps = dict[LogitDataset, float]  # with their weights
FINAL, SUMMARY = "model", "summary.json"
# Training arguments that do not change what is learnt: a run may go on with others.
FREE = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "report_to",
    "dataloader_",
    "disable_tqdm",
    "run_name",
)
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def run(config: TrainConfig, trainer_class: Callable[..., DistillTrainer] = DistillTrainer) -> Json:
    """Train, or go on with, the student in config.output; returns the summary that it also writes.

    A study's control arms bring a trainer of their own.
    Raises ConfigError, RefusedError (the student does not belong to the dump, or the directory
    holds another run), StorageError, Interrupted (a checkpoint was saved).
    """
    folder = model_dir.resolve(config.model, config.revision)
    tokenizer = model_dir.load_tokenizer(folder)
    dumps = open_dumps(config)
    held_out_dump = open_held_out(config)
    check_belongs(config, folder, tokenizer, dumps, held_out_dump)
    args = training_arguments(config)
    output = Path(config.output)
    domain, fingerprint = read_domain(config, tokenizer, dumps)
    identity = make_identity(config, args, folder, dumps, fingerprint)
    if (output / SUMMARY).exists():
        summary: Json = json.loads((output / SUMMARY).read_text())
        refuse_differences(output, summary["identity"], identity)
        say(f"{output}: nothing left to do; the student is in {output / FINAL}")
        return summary
    per_step = items_per_step(args)
    seed = args.seed if args.data_seed is None else args.data_seed
    general = GeneralStream(list(dumps), list(dumps.values()), seed) if dumps else None
    dataset = MixedDataset(domain, general, config.mix, seed, per_step, config.mix_by)
    texts = {
        name: held_out(corpus, tokenizer, max_length(config, dumps), adds_eos(dumps)).spread(
            config.held_out.sequences
        )
        for name, corpus in held_out_texts(config.held_out)
    }
    say(
        f"{output}: {len(domain):,} domain sequences ({len(domain.ids):,} tokens)"
        + "".join(
            f", {len(dump):,} general ones ({dump.manifest.tokens:,} tokens)" for dump in dumps
        )
        + (f", {dataset.mix:g} to 1 by {config.mix_by}" if dumps else "")
        + f", {per_step} domain sequences in a step"
    )
    memory.check(config, args, folder, row_tokens(config, args, domain, dumps))
    trainer: DistillTrainer | None = None

    def ask(name: str) -> bool:
        if trainer is None or trainer.steps.progress is None:
            return False  # nothing to save yet
        say(f"{name}: saving a checkpoint after this step")
        trainer.stop_asked = True
        return True

    with stop_on_signals(ask):
        model, dtype = load_student(config, folder, args)
        trainer = trainer_class(
            model,
            args,
            dataset,
            config.loss,
            row_tokens=config.row_tokens,
            held_out=texts,
            held_out_dump=held_out_dump,
            held_out_rows=config.held_out.dump_limit,
            gradient_cosine_steps=config.gradient_cosine_steps,
            identity=identity,
            processing_class=tokenizer,
        )
        checkpoint = trainer.resume_point()
        if checkpoint is not None:
            marker = json.loads((checkpoint / "distill.json").read_text())
            refuse_differences(output, marker["identity"], identity)
            say(f"{output}: going on from {checkpoint.name}")
        null_kl: list[float] = []
        if general is not None and checkpoint is None and config.null_test.batches:
            test = partial(null_test, config, trainer, general, identity["model"])
            trainer.before_training = lambda: null_kl.append(test())
        began = time.monotonic()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            trainer.steps.close()
        if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(f"stopped by a signal after step {trainer.state.global_step}")
    summary = {
        **last_logged(trainer.state.log_history),
        "steps": trainer.state.global_step,
        "best": best_checkpoint(trainer),
        "null_test_kl": null_kl[0] if null_kl else None,
        "seconds": time.monotonic() - began,
        "identity": identity,
    }
    save_final(config, trainer, folder, dtype, output / FINAL)
    if trainer.args.should_save:
        (output / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        best = summary["best"]
        which = f", that of {best['checkpoint']}" if best else ""
        say(f"{output}: the student is in {output / FINAL}{which}")
    return summary


def leave(code: int) -> None:
    """End this process, if it is one of several ranks, without the interpreter's own end.

    Threads of a process group may still be freeing tensors, and abort when they ask for an
    interpreter that is gone. What is registered for the exit (reporters' last uploads) is run.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def check_belongs(
    config: TrainConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dumps: Dumps,
    held_out_dump: LogitDataset | None = None,
) -> None:
    """RefusedError when the student cannot learn from a dump, or be measured on the held-out one.

    Reads no weights.
    """
    all_dumps = [*dumps, held_out_dump] if held_out_dump is not None else list(dumps)
    model_config = model_dir.load_config(folder)
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest and max_length(config, dumps) > longest:
        raise ConfigError(
            f"max_length {max_length(config, dumps)}: the student reads at most {longest} tokens"
        )
    vocabulary = model_dir.vocab_size(model_config)
    fingerprint = model_dir.tokenizer_fingerprint(tokenizer)[:16]
    for dump in all_dumps:
        name, plan = dump.dump.store.path, dump.plan
        if not len(dump):
            raise ConfigError(f"dump {name}: no rows, so there is no general corpus")
        found = {
            "vocabulary": (plan["vocab_size"], vocabulary),
            "tokenizer": (plan["tokenizer"]["fingerprint"][:16], fingerprint),
        }
        wrong = [
            f"  {what}: {there} in the dump, {here} in the student"
            for what, (there, here) in found.items()
            if there != here
        ]
        if wrong:
            raise RefusedError(
                f"student {config.model} does not belong to the dump {name} of "
                f"{plan['teacher']['name']}:\n" + "\n".join(wrong) + "\nStored ids mean other "
                "tokens to this student. Start from the dump's own base model, or dump with this "
                "tokenizer."
            )
    check_targets(config, dumps)
    plans = [dump.plan["teacher"] for dump in all_dumps]
    teachers = {teacher["fingerprint"]: teacher["name"] for teacher in plans}
    if len(teachers) > 1:
        raise RefusedError(
            f"the dumps are of different teachers ({', '.join(teachers.values())}): a student is "
            "held to one base model"
        )


def check_targets(config: TrainConfig, dumps: Dumps) -> None:
    """Refuse what cannot be learnt, or not together, of top-k entries and samples."""
    if config.loss.targets == "topk" and any(dump.plan["k"] == 0 for dump in dumps):
        raise ConfigError(
            "loss.targets topk: a dump holds samples alone (its k is 0); leave loss.targets out"
        )
    kinds = {(dump.draws > 0, dump.plan["k"] > 0) for dump in dumps}
    if len(kinds) > 1:
        raise RefusedError(
            "the dumps hold different targets, and their KL would not mean the same: "
            + ", ".join(
                f"{dump.dump.store.path} k {dump.plan['k']}, samples {dump.draws}" for dump in dumps
            )
            + ". Where all have a k above 0, loss.targets: topk leaves the samples out"
        )
    if config.loss.direction == "reverse" and any(dump.draws for dump in dumps):
        raise ConfigError(
            "loss.direction reverse: samples are unbiased for the forward direction alone, because "
            "the reverse takes the logarithm of what they estimate. Set loss.direction: forward, "
            "or loss.targets: topk where the dump has a k above 0"
        )


def open_dumps(config: TrainConfig) -> Dumps:
    """The dumps that the run reads; none where it trains on the domain alone."""
    if config.dump is None or config.mix == 0:
        return {}
    weights = config.dump if isinstance(config.dump, dict) else {config.dump: 1.0}
    samples = config.loss.targets != "topk"
    return {LogitDataset(path, samples=samples): weight for path, weight in weights.items()}


def open_held_out(config: TrainConfig) -> LogitDataset | None:
    """Its exact entries and tail: a KL to samples has their noise."""
    path = config.held_out.dump
    if path is None:
        return None
    dump = LogitDataset(path, samples=False)
    if dump.plan["k"] == 0:
        raise ConfigError(f"held_out.dump {path}: holds samples alone; a KL needs k above 0")
    return dump


def max_length(config: TrainConfig, dumps: Dumps) -> int:
    """Of domain sequences: the user's, or that of the longest dump."""
    if config.max_length is not None:
        return config.max_length
    return max(int(dump.plan["max_length"]) for dump in dumps)


def row_tokens(
    config: TrainConfig, args: TrainingArguments, domain: TokenSequences, dumps: Dumps
) -> int:
    """Tokens of the longest packed row there may be; an expectation where no limit is set."""
    longest = int(max(domain.lengths.max(), *(dump.lengths.max() for dump in dumps), 0))
    if config.row_tokens is not None:
        return max(config.row_tokens, longest)
    item: float = longest
    if dumps and config.mix_by == "tokens":
        item += config.mix * longest
    elif dumps:
        item += config.mix * sum(float(dump.lengths.mean()) for dump in dumps) / len(dumps)
    return int(args.train_batch_size * item)


def adds_eos(dumps: Dumps) -> bool:
    """Domain documents end as general ones do."""
    return all(dump.plan["add_eos"] for dump in dumps)


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The user's own, over defaults that suit this trainer; ConfigError for a name it lacks."""
    known = inspect.signature(TrainingArguments).parameters
    for name in config.training:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ConfigError(
                f"training.{name}: no such argument of transformers.TrainingArguments"
                + (f"; {close[0]} was perhaps meant" if close else "")
            )
    fixed = {
        "output_dir": config.output,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would wait for the device at each micro-step
    }
    clash = sorted(set(config.training) & set(fixed))
    if clash:
        raise ConfigError(
            f"training.{clash[0]}: is set by this script"
            + "; set output" * (clash[0] == "output_dir")
        )
    cuda = torch.cuda.is_available()
    held = metrics_of(config.held_out)
    defaults = {
        "use_cpu": not torch.accelerator.is_available(),  # several ranks then talk through gloo
        "logging_steps": 10,
        "report_to": "tensorboard",
        "dataloader_pin_memory": cuda,
        "dataloader_num_workers": 2 if cuda else 0,
        "eval_strategy": "epoch" if held else "no",
        "greater_is_better": False,  # perplexities and KL
    }
    # YAML reads a bare `no` as false
    given = {
        name: "no" if value is False and name.endswith("_strategy") else value
        for name, value in config.training.items()
    }
    try:
        args = TrainingArguments(**deepcopy({**defaults, **given, **fixed}))
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"training: {error}") from error
    if args.eval_strategy != "no" and not held:
        raise ConfigError(
            "training.eval_strategy: there is nothing to evaluate on; give held_out.domain.path, "
            "held_out.general.path, held_out.other.path or held_out.dump"
        )
    if args.torch_compile and fsdp.is_asked_for(args):
        raise ConfigError(
            "training.torch_compile does not go with FSDP here; leave one of them out"
        )
    # Before an Accelerator is made: one that was asked for FSDP asks the whole process for it.
    if fsdp.is_asked_for(args) and args.world_size == 1:
        raise ConfigError(
            "training.fsdp: one process has nothing to share out; start several with "
            "`accelerate launch --num_processes N`, or leave it out"
        )
    missing = set(args.report_to) - set(get_available_reporting_integrations()) - {"flyte"}
    if missing:
        name = min(missing)
        raise ConfigError(
            f"training.report_to {name}: the package is not installed; `pip install {name}`, or "
            "choose tensorboard or none. metrics.jsonl is written in any case"
        )
    best = args.metric_for_best_model
    if best is not None and f"eval_{best.removeprefix('eval_')}" not in held:
        raise ConfigError(
            f"training.metric_for_best_model {best}: nothing of that name is measured; "
            + (f"choose from {', '.join(held)}" if held else "give held_out.domain.path or another")
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
    return args


def metrics_of(held_out: HeldOutConfig) -> list[str]:
    """What evaluation during training measures."""
    perplexities = [f"eval_{kind}_perplexity" for kind, _ in held_out_texts(held_out)]
    return perplexities + [f"eval_{GENERAL_KL}"] * (held_out.dump is not None)


def read_domain(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, dumps: Dumps
) -> tuple[TokenSequences, str]:
    corpus = Corpus(config.domain, tokenizer, max_length(config, dumps), adds_eos(dumps))
    domain = TokenSequences(corpus)
    if not len(domain):
        raise ConfigError(
            f"corpus {config.domain.path}: no document has two tokens, so there is no domain to "
            "train on"
        )
    return domain, corpus.fingerprint()


def make_identity(
    config: TrainConfig,
    args: TrainingArguments,
    folder: Path,
    dumps: Dumps,
    domain_fingerprint: str,
) -> Json:
    """What decides the course of a run: one that is gone on with must have the same."""
    loss = asdict(config.loss)
    if config.loss.targets == "auto":  # as in runs of before there were targets to choose from
        del loss["targets"]
    identity = {
        "model": model_dir.weights_fingerprint(folder),
        "dump": ", ".join(f"{dump.fingerprint} × {weight:g}" for dump, weight in dumps.items()),
        "domain": domain_fingerprint,
        "mix": config.mix,
        "mix_by": config.mix_by,
        "max_length": max_length(config, dumps),
        "loss": loss,
        "lora": config.lora,
        "dtype": config.dtype,
        "sequences_per_step": items_per_step(args),
        "training": {
            name: value
            for name, value in config.training.items()
            if not name.startswith(FREE) and name not in BATCH
        },
    }
    plain: Json = json.loads(json.dumps(identity, default=str))
    return plain


def refuse_differences(output: Path, there: Json, here: Json) -> None:
    lines = differences(there, here, place="run")
    if lines:
        raise RefusedError(
            f"{output} holds a run with other settings:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nGo on with the old settings, or choose another output directory."
        )


def last_logged(history: list[Json]) -> Json:
    """The last value of each quantity that was logged."""
    names = ["loss", "ce", "kl", "teacher_tail", "domain_tokens", "general_tokens"]
    names += ["tokens_per_s", "wait_share"]
    found: Json = {}
    for line in history:
        found |= {
            name: value for name, value in line.items() if name in names or name.startswith("eval_")
        }
    return found


def best_checkpoint(trainer: DistillTrainer) -> Json | None:
    """The checkpoint that the student is, where the best one was asked for and not the last."""
    state, args = trainer.state, trainer.args
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    checkpoint = Path(state.best_model_checkpoint).name
    step = int(checkpoint.split("-")[1])
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    values = [line[metric] for line in state.log_history if line["step"] == step and metric in line]
    return {"checkpoint": checkpoint, "step": step, metric: values[-1]}
