"""The files of a model directory: read as JSON, and kept to those that lie inside of it."""

from pathlib import Path

from pipeline import json_files
from pipeline.errors import ConfigError
from pipeline.types import Json


def read_json(file: Path) -> Json:
    """The JSON object in a file of a model; ConfigError that names the file for anything else."""
    return json_files.read_json(file, "Copy it again from where the model comes from")


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
