"""The files of a model directory: read as JSON, and kept to those that lie inside of it."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

LARGEST_JSON = 1 << 28  # bytes; the largest tokenizer.json known has a tenth of it


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; ConfigError, with the file's name, for anything else."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"larger than {LARGEST_JSON:,} bytes")
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file}: expected JSON, found a file that cannot be read as that ({error}). Copy it "
            "again from where the model comes from"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def refuse_links_out(folder: Path) -> None:
    """ConfigError where a file of a model directory is a link to a file elsewhere.

    What such a link points to would be copied into dumps and students. The hub's cache is allowed:
    the files of models--X/snapshots/REVISION are links into models--X/blobs.
    """
    own = [folder.resolve(), *hub_blobs(folder.resolve())]
    for file in sorted(folder.iterdir()):
        target = file.resolve()
        if file.is_symlink() and target.is_file() and not any(map(target.is_relative_to, own)):
            raise ConfigError(
                f"model {folder}: {file.name} is a link to a file outside of the directory. Put "
                "the file itself there, or name the directory that holds all of them"
            )


def hub_blobs(folder: Path) -> list[Path]:
    """Where the hub's cache keeps the contents of this snapshot's files; none elsewhere."""
    return [
        part.parent / "blobs"
        for part in folder.parents
        if part.name == "snapshots" and part.parent.name.startswith("models--")
    ]
