"""Settings recorded beside a result: the same command resumes, other settings are refused."""

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.errors import RefusedError
from pipeline.types import Json
from storage.manifest import differences

LATER = {
    "special_tokens": "parse",
    "prompt_column": None,
    "completion_column": None,
    "tokens_column": None,
    "mask_column": None,
    "targets": None,
    "replies": None,
}
"""Settings that earlier releases lacked, with what these did."""
FREE = {"reread"}
"""Settings that change nothing in the result."""


def recorded(settings: Any) -> Json:
    """A dataclass of settings as a record has it: as in earlier releases where nothing is new."""
    return without_later(dataclasses.asdict(settings))


def without_later(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {
        name: part
        for name, part in value.items()
        if name not in FREE and LATER.get(name, ...) != part
    }
    return {name: without_later(part) for name, part in kept.items()}


def refuse_other_settings(folder: Path | str, there: Json, here: Json, what: str = "run") -> None:
    """RefusedError, with every difference, where `folder` holds a `what` with other settings."""
    lines = differences(there, here, place=what)
    if lines:
        raise RefusedError(
            f"{folder} holds a {what} with other settings:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nResume it with the old settings, or choose another output directory."
        )
