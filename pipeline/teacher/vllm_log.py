"""What vLLM writes goes to a file; what the user sees is the reason, in one line.

vLLM logs a traceback for each of its processes, one for each layer of its engine, and names the
reason in one of them. The file has all of it.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError, FailedError, Interrupted
from pipeline.passed import reason

# A user who sets this wants to see what vLLM writes. Read now: `engine_settings` sets it later.
SHOWN = "VLLM_LOGGING_LEVEL" in os.environ
ERROR = re.compile(r"^(?:.*\] +)?((?:\w+\.)*\w*(?:Error|Exception): \S.*)$", re.M)
# Errors that only pass on another one's.
PASSED_ON = re.compile(
    r"root cause|check the logs|failed to be inspected|CalledProcessError|raised in subprocess|"
    r"background process|validation error|EngineDead"
)
INVALID = re.compile(r"Value error, (.+?) \[type=", re.S)  # the message within pydantic's
# What another attempt does not change: the model or the settings are not what vLLM can do.
LIMIT = re.compile(
    r"(Assertion|Value|NotImplemented|Type|Attribute|Key|Import|ModuleNotFound)Error"
)
OUTSIDE = re.compile(r"memory", re.I)  # vLLM raises a ValueError where a GPU is full


class VllmLog:
    """The file that takes what vLLM writes to stdout and stderr while it starts, and what its
    other processes write as long as they live."""

    def __init__(self) -> None:
        self.path: Path | None = None
        if not SHOWN:
            handle, name = tempfile.mkstemp(prefix="mol-distill-vllm-", suffix=".log")
            os.close(handle)
            self.path = Path(name)

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Write file descriptors 1 and 2 to the file. `sys.stderr` stays where it was: it shows
        this project's own lines and the progress."""
        if self.path is None:
            yield
            return
        sys.stdout.flush()
        sys.stderr.flush()
        kept, shown = [os.dup(1), os.dup(2)], sys.stderr
        with self.path.open("ab") as file, os.fdopen(os.dup(2), "w", buffering=1) as stderr:
            if shown is sys.__stderr__:  # otherwise it does not write to descriptor 2
                sys.stderr = stderr
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr = shown
                for number, old in zip((1, 2), kept, strict=True):
                    os.dup2(old, number)
                    os.close(old)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    @property
    def place(self) -> str:
        return f"its log: {self.path}" if self.path is not None else "its log is above"

    def reason(self, error: Exception) -> str:
        """Why vLLM stopped, in one line: this error's own message, or the last one in the log that
        is not about another."""
        invalid = INVALID.search(str(error))
        own = f"ValueError: {invalid[1]}" if invalid else f"{type(error).__name__}: {error}"
        if not PASSED_ON.search(own):
            return reason(Exception(own))
        text = self.path.read_text(errors="replace") if self.path is not None else ""
        others = [found[1] for found in ERROR.finditer(text) if not PASSED_ON.search(found[1])]
        return reason(Exception(others[-1] if others else own))

    @contextlib.contextmanager
    def explained(self, model: object, before: str = "") -> Iterator[None]:
        """ConfigError or FailedError in place of vLLM's errors, with the reason and where the log
        is. `before` is the reason why an earlier way failed."""
        try:
            yield
        except (ConfigError, Interrupted):
            raise
        except Exception as error:
            reasons = [self.reason(error), before]
            known = "; ".join(text for text in dict.fromkeys(reasons) if text)
            limit = LIMIT.match(reasons[0]) and not OUTSIDE.search(reasons[0])
            kind = ConfigError if limit else FailedError
            raise kind(
                f"vLLM cannot run {model}: {known} ({self.place}). If it is one of vLLM's limits, "
                "change dtype or engine_args, or set engine: transformers, which is slow"
            ) from error
