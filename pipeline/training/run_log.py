"""What a run shows and writes at each step: progress, metrics.jsonl, the end at a signal."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from pipeline.progress import Progress
from pipeline.training import fsdp

if TYPE_CHECKING:
    from pipeline.training.trainer import DistillTrainer

METRICS = "metrics.jsonl"


class Steps(TrainerCallback):
    def __init__(self, trainer: "DistillTrainer") -> None:
        self.trainer = trainer
        self.progress: Progress | None = None
        self.status = "first step"

    @property
    def metrics(self) -> Path:
        return Path(self.trainer.args.output_dir) / METRICS

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        fsdp.say_shares(self.trainer.accelerator, self.trainer.model)
        if self.trainer.before_training is not None:
            self.trainer.before_training()
            fsdp.reshard(self.trainer.model)
        self.trainer.begin_log_interval()
        if not state.is_world_process_zero:
            return
        # A checkpoint carries the log up to it; what came after is going to be done again.
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        self.metrics.write_text("".join(json.dumps(line) + "\n" for line in state.log_history))
        self.progress = Progress(state.max_steps, "step", state.global_step)
        self.progress.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        sampler = self.trainer.epoch_sampler
        sampler.epoch = state.global_step // (len(sampler) // self.trainer.items_per_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.update(state.global_step, lambda: self.status)
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs:  # transformers' own summary, of this call only
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps(state.log_history[-1]) + "\n")
        names = ["loss", "ce", "kl", "tokens_per_s"]
        shown = [f"{name} {logs[name]:,.4g}" for name in names if name in logs]
        shown += [f"{name} {value:.4g}" for name, value in logs.items() if name.startswith("eval_")]
        self.status = ", ".join(shown)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
