"""DistillTrainer: transformers' Trainer with L = CE(domain) + alpha · KL(general, from disk).

Both losses are sums over the targets of the whole optimizer step, across micro-batches and ranks,
each divided by its own count: alpha means the same whatever the batches are made of. Targets are
the tokens that are learnt, all of a sequence where it has no mask.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pipeline.config import LossConfig
from pipeline.data.mixing import ORDERS, EpochSampler, MixedDataset
from pipeline.data.packing import PackedRow, collate, packed_rows, with_targets, without_targets
from pipeline.errors import ConfigError, RefusedError
from pipeline.evaluation.compare import compare
from pipeline.evaluation.measures import Sums
from pipeline.json_files import read_json, read_object, write_json
from pipeline.token_sequences import TokenSequences
from pipeline.training import fsdp
from pipeline.training.arguments import GENERAL_KL, items_per_step
from pipeline.training.disk import reading
from pipeline.training.draws import own_draws
from pipeline.training.gradients import gradient_parts
from pipeline.training.output import COMPLETE, Output
from pipeline.training.run_log import RunLog
from pipeline.types import Json
from storage import LogitDataset

Batch = dict[str, list[PackedRow]]
"""{"packed": rows}, as `collate` makes it."""


class DistillTrainer(Trainer):
    """A transformers.Trainer for packed domain and general batches; its arguments mean the same.

    A batch goes through the model in packed rows of at most `row_tokens` tokens. `vocab_size` is
    the width of the model's head. Each checkpoint stores `identity`. Evaluation reports the
    perplexity of each text in `held_out`, and the KL to the first `held_out_rows` rows of
    `held_out_dump` (all by default). Every `gradient_cosine_steps` steps it compares the gradients
    of CE and KL (gradients.py).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        dataset: MixedDataset,
        loss: LossConfig,
        *,
        row_tokens: int | None = None,
        vocab_size: int | None = None,
        held_out: dict[str, TokenSequences] | None = None,
        held_out_dump: LogitDataset | None = None,
        held_out_rows: int | None = None,
        gradient_cosine_steps: int = 0,
        identity: Json | None = None,
        **options: Any,
    ) -> None:
        self.loss, self.held_out, self.identity = loss, held_out or {}, identity or {}
        self.output = Output(Path(args.output_dir), self.identity)
        # transformers would count and delete whatever is named like a checkpoint.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        self.held_out_dump, self.held_out_rows = held_out_dump, held_out_rows
        self.gradient_cosine_steps = gradient_cosine_steps
        self.epoch_sampler, self.row_tokens = EpochSampler(dataset), row_tokens
        self.vocab_size, self.items_per_step = vocab_size, items_per_step(args)
        self.totals = {"domain_tokens": 0, "general_tokens": 0}
        self.sums = torch.zeros(3, device=args.device)  # CE, KL, teacher's tail since the last log
        self.first_bad = torch.full((), math.inf, device=args.device)  # step of a loss not finite
        self.last_row: PackedRow | None = None
        self.gradient_parts: dict[str, float] = {}  # of the last step that measured them
        self.waited = 0.0
        self.stop_asked = False  # a signal has reached this rank
        self.stopping = False  # the same on all ranks at each step
        self.before_training: Callable[[], Json] | None = None  # runs once the model is prepared
        self.null_test: Json | None = None  # what it returned, here or before the run was resumed
        super().__init__(
            model,
            args,
            partial(collate, row_tokens=row_tokens, vocab_size=vocab_size),
            dataset,
            eval_dataset=self.held_out or held_out_dump or None,
            **options,
        )
        self.loss_is_scaled_for_ga = True
        for shown in (PrinterCallback, ProgressCallback):
            self.remove_callback(shown)
        self.run_log = RunLog()
        self.add_callback(Hooks(self))
        self.add_callback(self.run_log)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        fsdp.set_up(self.accelerator, self.args)
        self.is_fsdp_enabled = fsdp.is_on(self.accelerator)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.epoch_sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimizer step, and its (domain, general) targets [2]."""
        began = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.waited += time.perf_counter() - began
        targets = [row["targets"] for batch in batches for row in batch["packed"]]
        counts = torch.tensor(
            [
                sum(len(target["labels"]) for target in targets),
                sum(len(target["tail_logprob"]) for target in targets),
                self.stop_asked,
                *(len(batch["packed"]) for batch in batches),
            ]
        )
        if self.args.world_size > 1:
            every = self.accelerator.gather(counts.to(device)[None]).cpu()
            counts = every.sum(0)
            # Each forward and backward needs all ranks, so all ranks need the same number of rows.
            for batch, rows in zip(batches, every[:, 3:].amax(0).tolist(), strict=True):
                idle = without_targets(batch["packed"][-1])
                batch["packed"] += [idle] * (rows - len(batch["packed"]))
        domain, general, stop = counts[:3].tolist()
        self.stopping = stop > 0
        self.totals["domain_tokens"] += domain
        self.totals["general_tokens"] += general
        totals = torch.tensor([domain, general])
        often = self.gradient_cosine_steps
        if often and (self.state.global_step + 1) % often == 0:
            began = time.perf_counter()
            self.gradient_parts = gradient_parts(
                self.model_wrapped,
                [row for batch in batches for row in batch["packed"]],
                partial(self.backward, totals),
                self.args.device,
            )
            self.logged_at += time.perf_counter() - began  # not training time
        return batches, totals

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """An epoch, or what is left of it; nothing where a finished run is resumed.

        transformers would take one more step, and look at max_steps after it.
        """
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **options)
        else:
            self.control.should_training_stop = True

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a batch, row by row; the last one synchronises the gradients."""
        *first, last = inputs["packed"]
        total = torch.zeros((), device=self.args.device)
        for row in first:
            with self.synchronised(model, False):
                total += super().training_step(model, row, num_items_in_batch)
        total = total + super().training_step(model, last, num_items_in_batch)
        # Looked at in `check_finite`: a look at each step would wait for the device.
        bad = torch.where(total.isfinite(), math.inf, float(self.state.global_step + 1))
        self.first_bad = torch.minimum(self.first_bad, bad)
        return total

    def backward(self, counts: Tensor, row: PackedRow, last: bool) -> None:
        """Forward and backward of a row outside a training step; adds the gradients to `.grad`.

        The loss is that of training, also in a class that changes it; it is not logged.
        """
        logged = self.sums.clone()
        with self.synchronised(self.model_wrapped, last):
            inputs = self._prepare_inputs(row)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=counts)
            self.accelerator.backward(loss)
        self.sums = logged

    def synchronised(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Delay gradient synchronisation until the last row of a batch.

        FSDP synchronises at each row: whole gradients would not fit.
        """
        if last or self.is_fsdp_enabled:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return context

    def floating_point_ops(self, inputs: Batch) -> int:
        return sum(super(DistillTrainer, self).floating_point_ops(row) for row in inputs["packed"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedRow,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        assert isinstance(num_items_in_batch, Tensor)
        outputs = self.row_losses(model, inputs, num_items_in_batch)
        domain, general = num_items_in_batch.tolist()
        losses, labels = outputs["losses"].detach(), len(inputs["targets"]["labels"])
        self.sums[0] += losses[:labels].sum() / max(domain, 1)
        self.sums[1] += losses[labels:].sum() / max(general, 1)
        self.sums[2] += inputs["targets"]["tail_logprob"].exp().sum() / max(general, 1)
        # DDP and FSDP average the ranks' gradients, but the counts already include all ranks.
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def row_losses(self, model: nn.Module, inputs: PackedRow, counts: Tensor) -> dict[str, Tensor]:
        """{"loss": a packed row's part of CE + alpha · KL, "losses": loss of each target}.

        `counts` are the step's (domain, general) targets over all micro-batches and ranks.
        """
        domain, general = counts.tolist()  # on the CPU, so this does not wait for the device
        targets = inputs["targets"]
        labels, tails = len(targets["labels"]), len(targets["tail_logprob"])
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        weights = targets["tail_logprob"].new_empty(labels + tails, dtype=dtype)
        weights[:labels] = 1 / max(domain, 1)
        weights[labels:] = self.loss.alpha / max(general, 1)
        outputs: dict[str, Tensor] = model(**with_targets(inputs, row_weights=weights))
        self.last_row = inputs
        return outputs

    def check_finite(self) -> None:
        """ConfigError where a step's loss was not finite, or would not be with the weights as they
        are after the last step. All ranks must call this; it costs a forward of one row."""
        first = self.first_bad
        if self.last_row is not None:
            step = float(self.state.global_step + 1)
            if not self.losses_of(self.last_row).isfinite().all():
                first = first.clamp(max=step)
            fsdp.reshard(self.model)
        if self.args.world_size > 1:
            first = self.accelerator.gather(first[None]).min()
        if math.isfinite(found := first.item()):
            raise diverged(int(found), "not finite")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add CE, KL and the teacher's mean tail, as means over the steps since the last log.

        Also adds the targets seen, the epochs, the speed, and the gradient measures if there are
        any. Raises ConfigError if the loss is not finite.
        """
        if "loss" in logs:
            sums = self.sums
            if self.args.world_size > 1:
                sums = self.accelerator.gather(sums[None]).sum(0)
            steps = self.state.global_step - self.logged_step
            now = time.perf_counter()
            tokens = sum(self.totals.values())
            elapsed = now - self.logged_at
            ce, kl, tail = (sums / steps).tolist()
            if not math.isfinite(logs["loss"]):
                raise diverged(self.state.global_step, f"{logs['loss']} (CE {ce}, KL {kl})")
            logs |= {"ce": ce, "kl": kl, "teacher_tail": tail, **self.totals}
            logs |= self.gradient_parts
            self.gradient_parts = {}
            logs |= self.train_dataset.epochs(self.state.global_step * self.items_per_step)
            logs["tokens_per_s"] = (tokens - self.logged_tokens) / elapsed
            logs["wait_share"] = self.waited / elapsed
            self.sums.zero_()
            self.begin_log_interval()
        super().log(logs, start_time)

    def begin_log_interval(self) -> None:
        self.logged_step = self.state.global_step
        self.logged_at = time.perf_counter()
        self.logged_tokens = sum(self.totals.values())
        self.waited = 0.0

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """{"eval_domain_perplexity": and so on for each held-out text, "eval_general_kl": KL to the
        held-out dump, in nats per target}."""
        began = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        metrics = {}
        for name, text in self.held_out.items():
            total = Sums()
            with self.accelerator.autocast():
                for sums in compare(model, None, text):
                    total += sums
            metrics[f"{metric_key_prefix}_{name}_perplexity"] = total.perplexity
        if self.held_out_dump is not None:
            kl = self.mean_kl(self.stored_rows(self.held_out_dump))
            metrics[f"{metric_key_prefix}_{GENERAL_KL}"] = kl
        fsdp.reshard(model)
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.logged_at += time.perf_counter() - began  # not training time
        return metrics

    @torch.no_grad()
    def mean_kl(self, rows: Iterable[PackedRow]) -> float:
        """Mean KL in nats to the targets of packed rows; every rank takes all rows."""
        self.model.eval()
        total, targets = 0.0, 0
        for row in rows:
            losses = self.losses_of(row)
            total, targets = total + losses.sum().item(), targets + len(losses)
        fsdp.reshard(self.model)
        return total / targets

    @torch.no_grad()
    def losses_of(self, row: PackedRow) -> Tensor:
        """float64 [N] on the CPU: the loss of each target of a packed row. Draws nothing that a
        step would draw."""
        weights = torch.ones(len(row["targets"]["rows"]))
        row = send_to_device(with_targets(row, row_weights=weights), self.model.device)
        with own_draws(self.args.device), self.accelerator.autocast():
            losses: Tensor = self.model(**row)["losses"]
        return losses.double().cpu()

    def stored_rows(self, dump: LogitDataset) -> Iterator[PackedRow]:
        """The first `held_out_rows` rows of a dump, or all, packed a batch at a time."""
        rows, size = min(self.held_out_rows or len(dump), len(dump)), self.args.eval_batch_size
        for at in range(0, rows, size):
            records = dump.read(range(at, min(at + size, rows)))
            yield from packed_rows([], records, self.row_tokens, self.vocab_size)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (self.output.make(name) / COMPLETE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()  # the owner's marker comes before any other file
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # the last marker follows the files of all ranks
        if self.args.should_save:
            marker = {"identity": self.identity, "step": self.state.global_step, **self.totals}
            marker |= {"null_test": self.null_test, "orders": ORDERS}
            write_json(self.output.folder / name / COMPLETE, marker)
            self.rotate()

    def rotate(self, keep_last: bool = True) -> None:
        """training.save_total_limit, for checkpoints of this run alone."""
        if self.save_total_limit and self.args.should_save:
            best = self.state.best_model_checkpoint
            self.output.rotate(self.save_total_limit, best, keep_last)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        with reading(Path(checkpoint), "weights"):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "optimizer or scheduler state"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "random number state"):
            super()._load_rng_state(checkpoint)

    def resume_point(self) -> Path | None:
        """The last whole checkpoint of this run; None if there is none.

        Removes the run's own incomplete checkpoints. Restores the token totals and what the null
        test found.
        Raises RefusedError for a checkpoint of another run, or of a release with other orders.
        """
        whole = []
        for folder in self.output.checkpoints():
            marker = read_object(folder / COMPLETE)
            if marker is not None:
                self.output.refuse_other(self.output.folder, marker["identity"])
                whole.append((folder, marker))
            elif self.args.should_save:
                self.output.remove(folder)
        if not whole:
            return None
        last, marker = whole[-1]
        check_orders(last, marker.get("orders", 1), self.train_dataset)
        read_json(last / TRAINER_STATE_NAME)
        self.totals = {name: marker[name] for name in self.totals}
        self.null_test = marker.get("null_test")  # markers of earlier releases have none
        return last


def check_orders(checkpoint: Path, orders: int, dataset: MixedDataset) -> None:
    """RefusedError if the run saw the sequences so far in orders that this release cannot go on."""
    if orders > ORDERS or (orders < ORDERS and dataset.orders_are_new):
        raise RefusedError(
            f"{checkpoint}: its run reads sequences in orders of version {orders}, this release in "
            f"those of version {ORDERS}; from here on some sequences would come twice, and others "
            "never. Go on with the release that began the run, or start again with another output"
        )


def diverged(step: int, loss: str) -> ConfigError:
    return ConfigError(
        f"step {step}: the loss is {loss}. Lower training.learning_rate or set "
        "training.max_grad_norm; earlier checkpoints are kept"
    )


class Hooks(TrainerCallback):
    """Work of the trainer at points where transformers only calls callbacks."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        fsdp.say_shares(trainer.accelerator, trainer.model)
        if trainer.before_training is not None:
            trainer.null_test = trainer.before_training()
            fsdp.reshard(trainer.model)
        trainer.begin_log_interval()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        sampler = self.trainer.epoch_sampler
        sampler.epoch = state.global_step // (len(sampler) // self.trainer.items_per_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.save_total_limit == 1 and state.best_model_checkpoint is not None:
            self.trainer.rotate(keep_last=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True
