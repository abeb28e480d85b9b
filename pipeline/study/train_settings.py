"""Settings of scripts/train_student.py in a study: merged, and without what it sets itself."""

from collections.abc import Iterator
from typing import Any

from pipeline.config import require
from pipeline.passed import brief
from pipeline.types import Json

SEEDS = "set seeds of the study or of the arm"
RATES = "set learning_rates of the study or of the arm"
OWN = {
    "output": "set output of the study, which has a directory for each run",
    "training.output_dir": "set output of the study, which has a directory for each run",
    "training.seed": SEEDS,
    "training.learning_rate": RATES,
}
"""Set for each run, whatever the value, with what to set instead."""
DUMP = {"dump": "name it in dumps of the study, and set dump of the arm to that name"}
"""The same in a study with dumps."""


def merged(one: Json, other: Json) -> Json:
    """Both, merged at every level; `other` wins."""
    found = dict(one)
    for name, value in other.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else value
    return found


def flat(settings: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each setting: a file may have either spelling."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_train(settings: Json, place: str, has_dumps: bool = False) -> None:
    """ConfigError for settings that the study would override, or that cannot be merged.

    `place` is where they stand, such as "arms.mol.train.".
    """
    training, mix = settings.get("training", {}), settings.get("mix", 1)
    require(
        isinstance(training, dict),
        f"{place}training: expected arguments of transformers.TrainingArguments by name, such as "
        f"{{max_steps: 100}}, found {brief(training)}",
    )
    require(
        isinstance(mix, int | float) and not isinstance(mix, bool),
        f"{place}mix: expected a number, found {brief(mix)}",
    )
    own = OWN | (DUMP if has_dumps else {})
    for name, _ in flat(settings):
        for theirs, instead in own.items():
            require(
                name != theirs and not name.startswith(f"{theirs}."),
                f"{place}{name}: the study sets it for each run; {instead}",
            )


def refuse_two_places(train: Json, training: Json) -> None:
    """ConfigError for an argument of training that stands in a study's `train`, too."""
    for name, _ in flat(train):
        first, _, argument = name.partition(".")
        require(
            first != "training" or argument not in training,
            f"train.{name} and training.{argument}: both are for all arms; leave one of them out",
        )
