"""Failures of the files of an output directory, whichever library meets them."""

import contextlib
import errno
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from pipeline.errors import ConfigError, FailedError
from storage.store import ADVICE

TORCH = re.compile("unexpected pos|PytorchStreamWriter failed|iostream error")
"""What torch.save says where a file could not be written."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise FailedError, which names the directory, where the disk fails; other errors pass."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = disk_failure(error)
        if reason is None:
            raise
        raise FailedError(
            f"{folder}: cannot be written: {reason}. The last whole checkpoint is kept"
        ) from error


UNREADABLE = (
    *(pickle.UnpicklingError, SafetensorError, EOFError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
"""What libraries raise for a checkpoint's file that was damaged, or is not theirs."""


@contextlib.contextmanager
def reading(checkpoint: Path, part: str) -> Iterator[None]:
    """ConfigError, which names the checkpoint, where this part of it cannot be read."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        found = str(error).partition(".")[0].partition("\n")[0]
        raise ConfigError(
            f"{checkpoint}: its {part} cannot be read ({type(error).__name__}: {found}). Restore "
            "the checkpoint from a copy, or remove it to resume from the one before"
        ) from error


def disk_failure(error: Exception) -> str | None:
    """What an error says of the disk; None for an error of another kind."""
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    else:
        number = error.errno if isinstance(error, OSError) else None
    if number in ADVICE and number not in (errno.ENOENT, errno.ENOTDIR):
        return ADVICE[number]
    if number == errno.EFBIG:
        return f"{os.strerror(errno.EFBIG)}: raise the limit on the size of files"
    if TORCH.search(str(error)):
        return "a file could not be written whole: is the disk full? Free some space"
    return None
