"""JSON files: written whole or not at all, strict whatever the numbers; read with clear errors."""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.types import Json

LARGEST = 1 << 28  # bytes; the largest tokenizer.json known has a tenth of it


def write_json(path: Path, content: Any) -> None:
    """Write a file that readers see whole, or not at all; makes its folder.

    JSON has no NaN and no infinities: they become the strings "NaN", "Infinity" and "-Infinity", as
    in protobuf's JSON. float() reads these as it reads a number.
    """
    write_text(path, json.dumps(strict(content), indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a file with the JSON of a row in each line, like `write_json`."""
    lines = (json.dumps(strict(row), allow_nan=False, ensure_ascii=False) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    """Write a file that readers see whole, or not at all; makes its folder."""
    if path.exists() and not path.is_file():  # a pipe or a terminal
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def strict(value: Any) -> Any:
    """The same value without floats that JSON lacks."""
    if isinstance(value, dict):
        return {name: strict(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [strict(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_json(path: Path, repair: str = "Restore it from a copy") -> Json:
    """The JSON object in a file; ConfigError that names the file for anything else."""
    try:
        return parsed(read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: expected a JSON object, found {reason(error)}. {repair}"
        ) from None


def read_lines(path: Path) -> list[Json]:
    """The JSON objects in a file, one a line; ConfigError that names the file and the line.

    A last line that a crash cut short is left out.
    """
    try:
        *lines, last = read(path).split(b"\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected lines of JSON, found {reason(error)}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(parsed(line))
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}, line {number}: expected a JSON object, found {reason(error)}. "
                "Restore the file from a copy, or remove the line"
            ) from None
    with contextlib.suppress(ValueError):
        found.append(parsed(last))
    return found


def read_object(path: Path) -> Json | None:
    """The JSON object in a file; None where there is no file, or one that was cut short."""
    try:
        return parsed(read(path))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def read(path: Path) -> bytes:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"a file of more than {LARGEST:,} bytes")
    return path.read_bytes()


def parsed(data: bytes) -> Json:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError(type(found).__name__)
    return found


def reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON that is nested too deep"
    if isinstance(error, UnicodeDecodeError | json.JSONDecodeError):
        return f"what is not JSON ({error})"
    return str(error)
