"""Stage two: train a student with CE on a domain and KL to the base model, read from a dump.

    python scripts/train_student.py --config scripts/configs/train.yaml
    python scripts/train_student.py --config scripts/configs/train.yaml \\
        --domain.path notes.jsonl --loss.alpha 0.5 --training.learning_rate 1e-5

Starts with a null test: a student that still equals the teacher must have a KL near 0. Writes
metrics.jsonl, checkpoints, and the final model to OUTPUT/model, which vLLM and
AutoModelForCausalLM load. `training` goes to transformers.TrainingArguments unchanged;
--training.learning_rate changes one argument of the config's.

An interruption saves a checkpoint; run the same command again to resume from it.

Exit codes: 0 done, 1 failed (another run is at work in OUTPUT, or a store does not answer; run it
again), 2 bad input, 3 refused (the student does not belong to the dump, or the directory holds
another run), 4 damaged dump, 75 interrupted.
"""

import sys
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.config import TrainConfig
from pipeline.errors import DONE, INTERRUPTED
from pipeline.training.lock import turn_away


def main() -> int:
    parser = cli.script_parser(TrainConfig, __doc__ or "", show_document=True)
    config, own = cli.parse(parser, TrainConfig)
    if own.show_document:
        from pipeline import show_document

        return cli.main(lambda: show_document.run(own.show_document, config), own.summary)
    code = cli.main(lambda: work(config), own.summary)
    if code in (DONE, INTERRUPTED):  # all ranks get here; after an error some may still wait
        from pipeline.training import train

        train.leave(code)
    return code


def work(config: TrainConfig) -> dict[str, Any]:
    turn_away(Path(config.output).expanduser())
    # After the settings are known to be good: torch takes seconds.
    from pipeline.training import train

    return train.run(config)


if __name__ == "__main__":
    sys.exit(main())
