"""The command line of every script: options and YAML in, a summary as JSON and an exit code out."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from pipeline.errors import (
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

Config = TypeVar("Config")

# The docstring under a field of a settings dataclass is its help text.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of a script's docstring: its commands are there to be copied."""


def script_parser(config: type[Config], description: str) -> jsonargparse.ArgumentParser:
    """A parser with --config and every field of the dataclass as a dotted option."""
    parser = jsonargparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--config", action="config", help="a YAML file with the settings below")
    parser.add_class_arguments(config, None)
    parser.add_argument("--summary", metavar="FILE", help="write what was done to FILE as JSON")
    return parser


def parse(
    parser: jsonargparse.ArgumentParser, config: type[Config], arguments: list[str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """(the settings, the script's own options). Exits with 2 and a message for what is wrong."""
    found = parser.parse_args(arguments)
    own = set(config.__dataclass_fields__)  # type: ignore[attr-defined]
    made = parser.instantiate(found)
    try:
        settings = config(**{name: made[name] for name in own})
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    return settings, argparse.Namespace(
        **{name: value for name, value in vars(made).items() if name not in own}
    )


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
