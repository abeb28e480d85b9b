"""What a run shows and writes as it goes: a progress line and metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pipeline.json_files import strict
from pipeline.progress import Progress
from pipeline.training.output import METRICS


class RunLog(TrainerCallback):
    """Only rank 0 shows and writes."""

    def __init__(self) -> None:
        self.begun = False  # on every rank: whether a signal has something to save
        self.progress: Progress | None = None
        self.status = "first step"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = True
        if not state.is_world_process_zero:
            return
        # A checkpoint carries the log up to it; the steps after it are done again.
        metrics = Path(args.output_dir) / METRICS
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text("".join(json.dumps(strict(line)) + "\n" for line in state.log_history))
        self.progress = Progress(state.max_steps, "step", state.global_step)
        self.progress.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.update(state.global_step, lambda: self.status)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs:  # transformers' own summary of this call alone
            return
        with (Path(args.output_dir) / METRICS).open("a") as file:
            file.write(json.dumps(strict(state.log_history[-1])) + "\n")
        names = ["loss", "ce", "kl", "tokens_per_s"]
        shown = [f"{name} {logs[name]:,.4g}" for name in names if name in logs]
        shown += [f"{name} {value:.4g}" for name, value in logs.items() if name.startswith("eval_")]
        self.status = ", ".join(shown)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
