"""Settings recorded beside a result: the same command resumes, other settings are refused."""

from pathlib import Path

from pipeline.errors import RefusedError
from pipeline.types import Json
from storage.manifest import differences


def refuse_other_settings(folder: Path | str, there: Json, here: Json, what: str = "run") -> None:
    """RefusedError, with every difference, where `folder` holds a `what` with other settings."""
    lines = differences(there, here, place=what)
    if lines:
        raise RefusedError(
            f"{folder} holds a {what} with other settings:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nResume it with the old settings, or choose another output directory."
        )
