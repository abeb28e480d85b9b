"""Stage two: a domain corpus and a dump on disk -> a student. No teacher is in memory."""

import difflib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from pipeline import model_dir
from pipeline.config import ConfigError, Interrupted, RefusedError, TrainConfig
from pipeline.corpus import Corpus
from pipeline.evaluate import held_out
from pipeline.mixing import GeneralStream, MixedDataset, TokenSequences
from pipeline.null_test import null_test
from pipeline.progress import say
from pipeline.signals import stop_on_signals
from pipeline.trainer import DistillTrainer, add_distill_forward, items_per_step
from storage import LogitDataset
from storage.manifest import differences

Json = dict[str, Any]
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
    check_belongs(config, folder, tokenizer, dumps)
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
        name: held_out(corpus, tokenizer, max_length(config, dumps), adds_eos(dumps))
        for name, corpus in [
            ("domain", config.held_out.domain),
            ("general", config.held_out.general),
        ]
        if corpus is not None
    }
    say(
        f"{output}: {len(domain):,} domain sequences ({len(domain.ids):,} tokens)"
        + "".join(
            f", {len(dump):,} general ones ({dump.manifest.tokens:,} tokens)" for dump in dumps
        )
        + (f", {dataset.mix:g} to 1 by {config.mix_by}" if dumps else "")
        + f", {per_step} domain sequences in a step"
    )
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
            identity=identity,
            processing_class=tokenizer,
        )
        checkpoint = trainer.resume_point()
        if checkpoint is not None:
            marker = json.loads((checkpoint / "distill.json").read_text())
            refuse_differences(output, marker["identity"], identity)
            say(f"{output}: going on from {checkpoint.name}")
        null_kl = None
        if general is not None and checkpoint is None and config.null_test.batches:
            null_kl = null_test(config, trainer, general, identity["model"])
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
        "null_test_kl": null_kl,
        "seconds": time.monotonic() - began,
        "identity": identity,
    }
    if trainer.args.should_save:
        save_final(trainer, tokenizer, dtype, output / FINAL)
        (output / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        say(f"{output}: the student is in {output / FINAL}")
    return summary


def check_belongs(
    config: TrainConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, dumps: Dumps
) -> None:
    """RefusedError when the student cannot learn from a dump. Reads no weights."""
    model_config = model_dir.load_config(folder)
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest and max_length(config, dumps) > longest:
        raise ConfigError(
            f"max_length {max_length(config, dumps)}: the student reads at most {longest} tokens"
        )
    vocabulary = model_dir.vocab_size(model_config)
    fingerprint = model_dir.tokenizer_fingerprint(tokenizer)[:16]
    for dump in dumps:
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
    teachers = {dump.plan["teacher"]["fingerprint"]: dump.plan["teacher"]["name"] for dump in dumps}
    if len(teachers) > 1:
        raise RefusedError(
            f"the dumps are of different teachers ({', '.join(teachers.values())}): a student is "
            "held to one base model"
        )


def open_dumps(config: TrainConfig) -> Dumps:
    """The dumps that the run reads; none where it trains on the domain alone."""
    if config.dump is None or config.mix == 0:
        return {}
    weights = config.dump if isinstance(config.dump, dict) else {config.dump: 1.0}
    return {LogitDataset(path): weight for path, weight in weights.items()}


def max_length(config: TrainConfig, dumps: Dumps) -> int:
    """Of domain sequences: the user's, or that of the longest dump."""
    if config.max_length is not None:
        return config.max_length
    return max(int(dump.plan["max_length"]) for dump in dumps)


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
    held = config.held_out.domain or config.held_out.general
    defaults = {
        "use_cpu": not torch.accelerator.is_available(),  # several ranks then talk through gloo
        "logging_steps": 10,
        "report_to": "tensorboard",
        "dataloader_pin_memory": cuda,
        "dataloader_num_workers": 2 if cuda else 0,
        "eval_strategy": "epoch" if held else "no",
    }
    # YAML reads a bare `no` as false
    given = {
        name: "no" if value is False and name.endswith("_strategy") else value
        for name, value in config.training.items()
    }
    try:
        args = TrainingArguments(**{**defaults, **given, **fixed})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"training: {error}") from error
    if args.eval_strategy != "no" and not held:
        raise ConfigError(
            "training.eval_strategy: there is nothing to evaluate on; give held_out.domain.path "
            "or held_out.general.path"
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
    identity = {
        "model": model_dir.weights_fingerprint(folder),
        "dump": ", ".join(f"{dump.fingerprint} × {weight:g}" for dump, weight in dumps.items()),
        "domain": domain_fingerprint,
        "mix": config.mix,
        "mix_by": config.mix_by,
        "max_length": max_length(config, dumps),
        "loss": asdict(config.loss),
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


def load_student(
    config: TrainConfig, folder: Path, args: TrainingArguments
) -> tuple[PreTrainedModel, torch.dtype]:
    """(the model to train, with the distilling forward; the dtype it came in)."""
    model = model_dir.load_model(folder, config.dtype)
    came_in = getattr(torch, model_dir.own_dtype(model_dir.load_config(folder)))
    add_distill_forward(model, config.loss.direction)
    if config.lora is not None:
        import peft

        try:
            lora = peft.LoraConfig(**{"task_type": "CAUSAL_LM", **config.lora})
            model = peft.get_peft_model(model, lora)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"lora: {error}") from error
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
    return model, came_in


def last_logged(history: list[Json]) -> Json:
    """The last value of each quantity that was logged."""
    names = ("loss", "ce", "kl", "domain_tokens", "general_tokens", "tokens_per_s", "wait_share")
    found: Json = {}
    for line in history:
        found |= {
            name: value
            for name, value in line.items()
            if name in names or name.endswith("_perplexity")
        }
    return found


def save_final(
    trainer: DistillTrainer,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """A plain Hugging Face directory: LoRA merged, in the dtype the student came in."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    model.to(dtype).save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
