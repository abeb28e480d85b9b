"""Where a script may write: not over what it reads, nor into it, by any spelling."""

import dataclasses
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import CorpusConfig
from pipeline.errors import ConfigError

MODELS, DUMPS = ("model", "models"), ("dump", "dumps")
"""Settings that name what is read; a text, or several with their names or weights."""
TASKS = "tasks"


def inputs_of(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(setting, what it names) of every corpus, model and dump that a script reads."""
    for field in dataclasses.fields(settings):
        name, value = prefix + field.name, getattr(settings, field.name)
        if isinstance(value, CorpusConfig):
            yield f"{name}.path", value.path
        elif field.name == TASKS:
            for task, given in value.items():
                for part in ("path", "folder"):
                    if getattr(given, part) is not None:
                        yield f"{name}.{task}.{part}", getattr(given, part)
        elif dataclasses.is_dataclass(value):
            yield from inputs_of(value, f"{name}.")
        elif field.name in (*MODELS, *DUMPS):
            for part in named(value, field.name):
                yield (name if isinstance(value, str) else f"{name} {part}"), part


def named(value: Any, name: str) -> list[str]:
    if not isinstance(value, dict):
        return [] if value is None else [value]
    found = value if name == "dump" else value.values()  # a dump has its weight as value
    return [part for part in found if isinstance(part, str)]


def check_output(output: str, inputs: dict[str, str]) -> None:
    """ConfigError for an output directory that is an input, holds one, or lies in one, and for one
    that cannot be made because a file is in its place."""
    if "://" in output and not os.path.lexists(output):
        refuse_nested_urls(output, inputs)
        return
    folder = Path(output).expanduser()
    refuse_inputs_inside(folder, inputs)
    refuse_inside_inputs(folder, inputs)
    refuse_no_directory(folder, "output", output)


def check_file(option: str, file: str, inputs: dict[str, str]) -> None:
    """ConfigError for a file to be written that is an input or lies in one, that is a directory, or
    whose directory cannot be made because a file is in its place."""
    path = Path(file).expanduser()
    refuse_inside_inputs(path, inputs, option)
    refuse_no_directory(path.parent, option, file)
    if path.is_dir():
        raise ConfigError(
            f"{option} {file}: expected a file, found a directory; choose another {option}"
        )


def refuse_no_directory(folder: Path, option: str, given: str) -> None:
    """ConfigError where a directory cannot be made: it, or one above it, is something else."""
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    if there is None or there.is_dir():
        return
    where = "" if there == Path(given).expanduser() else f" at {there}"
    found = "a file" if there.exists() else "a link that leads nowhere"
    raise ConfigError(
        f"{option} {given}: expected a directory{where}, found {found}; choose another {option}"
    )


def refuse_nested_urls(output: str, inputs: dict[str, str]) -> None:
    root = output.rstrip("/") + "/"
    for name, given in inputs.items():
        path = given.rstrip("/") + "/"
        if "://" in given and (path.startswith(root) or root.startswith(path)):
            raise ConfigError(
                f"output {output}: it and {name} ({given}) lie in one another; choose another "
                "output directory"
            )


def refuse_inputs_inside(folder: Path, inputs: dict[str, str]) -> None:
    """ConfigError where a local input is the output directory or lies in it, by any spelling."""
    root = folder.resolve()
    for name, given in inputs.items():
        for path in local_files(given):
            # A link in the output that leads out of it counts too: the run may meet its name.
            for real in (path.resolve(), path.parent.resolve() / path.name):
                if real.is_relative_to(root):
                    raise ConfigError(
                        f"output {folder}: contains {name} ({path}), which a run must not write "
                        "over; choose another output directory"
                    )


def refuse_inside_inputs(output: Path, inputs: dict[str, str], option: str = "output") -> None:
    """ConfigError where what is written would become a part of an input."""
    for name, given in inputs.items():
        for path in local_files(given):
            if output.resolve().is_relative_to(path.resolve()):
                raise ConfigError(
                    f"{option} {output}: lies in {name} ({path}), and would be read as a part of "
                    "it; choose another place"
                )


def local_files(given: str) -> list[Path]:
    """What an input's setting names on this machine; nothing for the hub and object stores."""
    path = Path(given).expanduser()
    if os.path.lexists(path):
        return [path]
    return [Path(found) for found in glob.glob(str(path), recursive=True)]
