"""Small JSON files: written whole or not at all, and strict JSON whatever the numbers."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a file that readers see whole, or not at all; makes its folder.

    JSON has no NaN and no infinities: they become the strings "NaN", "Infinity" and "-Infinity", as
    in protobuf's JSON. float() reads these as it reads a number.
    """
    text = json.dumps(strict(content), indent=1, allow_nan=False) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a terminal
        path.write_text(text)
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


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or one that was cut short."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None
