"""How every script ends: its errors as one message and an exit code, its summary as JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import (
    BAD_INPUT,
    DAMAGED,
    DONE,
    FAILED,
    INTERRUPTED,
    REFUSED,
    ConfigError,
    FailedError,
    Interrupted,
    RefusedError,
)
from storage import IncompleteDump, PlanMismatch, StorageError, StoreError

CODES: list[tuple[type[Exception], int]] = [
    (ConfigError, BAD_INPUT),
    (IncompleteDump, BAD_INPUT),
    (PlanMismatch, REFUSED),
    (RefusedError, REFUSED),
    (FailedError, FAILED),
    (StoreError, FAILED),
    (StorageError, DAMAGED),
    (Interrupted, INTERRUPTED),
]


def main(work: Callable[[], dict[str, Any]], summary_file: str | None) -> int:
    """Run the script's work; returns the exit code."""
    try:
        summary = work()
    except tuple(kind for kind, _ in CODES) as error:
        code = next(code for kind, code in CODES if isinstance(error, kind))
        again = code in (INTERRUPTED, FAILED)
        hint = "; run the same command again to go on" if again else ""
        print(f"error: {error}{hint}", file=sys.stderr, flush=True)
        return code
    if summary_file:
        Path(summary_file).write_text(json.dumps(summary, indent=1) + "\n")
    return DONE
