"""The command line of every script: options and YAML in, a summary as JSON and an exit code out."""

import argparse
import dataclasses
import difflib
import itertools
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml

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
from pipeline.foreign import printable, refuse_secrets
from pipeline.json_files import write_json
from pipeline.outside import is_outside
from pipeline.places import check_file, inputs_of
from storage import IncompleteDump, PlanMismatch, StorageError, StoreError

# transformers imports bitsandbytes, which on some CPUs advises to install what runs hub code.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

Config = TypeVar("Config")

# The docstring under a field of a settings dataclass is its help text.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

MOST_VALUES = 100_000  # in a config file, once its aliases are written out


def load_yaml(text: str) -> Any:
    """YAML as jsonargparse reads it; YAMLError for a key that is there twice, and where aliases
    make too much of a small file."""
    if ":" in text or "*" in text:  # else no key, and no alias
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if "*" in text and written_out(tree, {}) > MOST_VALUES:
            raise yaml.YAMLError(
                f"its aliases (*name) expand to more than {MOST_VALUES:,} values; write them out"
            )
        refuse_twice(tree, set())
    return plain_yaml(text)


def refuse_twice(node: Any, seen: set[int]) -> None:
    """YAMLError for a mapping with a key twice: YAML would take the last one in silence."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[tuple[str, str], int] = {}
    for part in node.value:
        key, value = part if type(part) is tuple else (None, part)
        if isinstance(key, yaml.ScalarNode):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"{key.value}: is in line {lines[name]} and again in line {line}, and only one "
                    "of them would count; rename one, or leave it out"
                )
            lines[name] = line
        refuse_twice(value, seen)


def written_out(node: Any, known: dict[int, float]) -> float:
    """Values of a YAML node with its aliases written out; infinite where one holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is counted
        parts = [part for pair in node.value for part in (pair if type(pair) is tuple else [pair])]
        known[id(node)] = 1 + sum(written_out(part, known) for part in parts)
    return known[id(node)]


plain_yaml = jsonargparse.get_loader("yaml")
jsonargparse.set_loader("yaml", load_yaml, (yaml.YAMLError, RecursionError))

NO_FILE = "Problems parsing config:"
UNKNOWN = re.compile("unrecognized|not accepted|not accept option")
TEMPERATURE = (
    "There is no temperature: top-k probabilities taken at 1 do not determine the distribution at "
    "another one, because most of its mass would lie outside the stored ids. Leave the setting out."
)


SHOW = (
    "print document N of a corpus, counted from 0, as the model reads it, with what is learnt "
    "marked; do nothing else. CORPUS is its setting, such as held_out.domain; by default the first "
    "one"
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of a script's docstring, whose commands are there to be copied, and shows
    defaults but no Python types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, {}, argparse.SUPPRESS) or not action.option_strings:
            return text
        return f"{text} (default: {action.default})"


class Parser(jsonargparse.ArgumentParser):
    """Ends with exit code 2 and the reason alone, not with a page of usage.

    jsonargparse groups settings by class, and needs that to make the classes; `shown_groups` are
    the groups that help shows instead.
    """

    shown_groups: Callable[[], list[argparse._ArgumentGroup]] | None = None
    files = ""

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        apart = [value for name, value in itertools.pairwise(words) if name == "--config"]
        joined = [word.partition("=")[2] for word in words if word.startswith("--config=")]
        self.files = ", ".join(apart + joined)
        return super().parse_args(words, *others, **options)

    def format_help(self, *arguments: Any) -> str:
        groups = self._action_groups
        if self.shown_groups is not None:
            self._action_groups = self.shown_groups()  # type: ignore[assignment]
        try:
            return str(super().format_help(*arguments))
        finally:
            self._action_groups = groups

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if message.startswith(NO_FILE):  # jsonargparse does not say which
            message = f"--config {self.files}: {message.removeprefix(NO_FILE).strip()}"
        hint = self.hint(message) if UNKNOWN.search(message) else ""
        give_up(f"{message}{hint}\n{self.prog} --help lists the settings")

    def hint(self, message: str) -> str:
        """What was perhaps meant by an unknown setting."""
        if "temperature" in message:
            return f"\n{TEMPERATURE}"
        names = {action.dest.rpartition(".")[2]: action.dest for action in self._actions}
        names |= {action.dest: action.dest for action in self._actions}
        words = [word for word in re.findall(r"[\w.]+", message) if word not in names]
        close = [near for word in words for near in difflib.get_close_matches(word, names, 1, 0.8)]
        return f"; did you mean {names[close[0]]}?" if close else ""


def script_parser(
    config: type[Config], description: str, show_document: bool = False
) -> jsonargparse.ArgumentParser:
    """A parser with --config and every field of the dataclass as a dotted option."""
    parser = Parser(
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
        description=description,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", action="config", help="YAML file with the settings below"
    )
    parser.add_argument("--summary", metavar="FILE", help="write what was done to FILE as JSON")
    if show_document:
        parser.add_argument("--show_document", metavar="[CORPUS:]N", help=SHOW)
    known = set(parser._actions)
    parser.add_class_arguments(config, None)
    added = [action for action in parser._actions if action not in known]
    needed = {action.dest for action in added if action.required}  # changes while parsing
    common: tuple[str, ...] = getattr(config, "common", ())
    parser.shown_groups = lambda: help_groups(parser, added, needed, common)
    return parser


def help_groups(
    parser: Parser, settings: list[argparse.Action], needed: set[str], common: tuple[str, ...]
) -> list[argparse._ArgumentGroup]:
    """The script's own options, then the settings: needed, common (`config.common`), expert."""
    groups = [
        argparse._ArgumentGroup(parser, f"{kind} settings")
        for kind in ("needed", "common", "expert")
    ]
    for action in settings:
        name = action.dest
        if "config" in type(action).__name__.lower() or name.endswith(".help"):
            action.help = argparse.SUPPRESS  # a file for one part of the settings: --config does
        action.metavar = action.metavar or (None if action.choices else "VALUE")
        kind = 0 if name in needed else 1 if name in common else 2
        groups[kind]._group_actions.append(action)
    groups[1]._group_actions.sort(key=lambda action: common.index(action.dest))
    own = [g for g in parser._action_groups if not set(g._group_actions) & set(settings)]
    return [*own, *groups]


def parse(
    parser: jsonargparse.ArgumentParser, config: type[Config], arguments: list[str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """(the settings, the script's own options). Exits with 2 and a message for what is wrong.

    Makes the folder of --summary, so that what was done can be written down in the end.
    """
    found = parser.parse_args(arguments)
    own = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    try:
        made = parser.instantiate(found)
        settings = config(**{name: made[name] for name in own})
        refuse_secrets(settings)
        if made.summary is not None:
            check_file("--summary", made.summary, dict(inputs_of(settings)))
            prepare(Path(made.summary).expanduser())
    except ConfigError as error:
        give_up(str(error))
    return settings, argparse.Namespace(
        **{name: value for name, value in vars(made).items() if name not in own}
    )


def prepare(summary: Path) -> None:
    """Make the folder of a file; ConfigError where the file could not be written in the end."""
    try:
        summary.parent.mkdir(parents=True, exist_ok=True)
        if summary.is_dir():
            raise IsADirectoryError(f"{summary} is a directory")
        special = summary.exists() and not summary.is_file()  # a pipe or a terminal
        if not os.access(summary if special else summary.parent, os.W_OK):
            raise PermissionError(f"{summary} cannot be written by this user")
    except OSError as error:
        raise ConfigError(f"--summary {summary}: cannot be written ({error})") from None


def say_error(message: str) -> None:
    """On stderr; what a file or a name brings into the message cannot command the terminal."""
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)


def give_up(message: str) -> NoReturn:
    say_error(message)
    sys.exit(BAD_INPUT)


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
        hint = "; run the same command again to resume" if again else ""
        say_error(f"{error}{hint}")
        return code
    except OSError as error:
        if not is_outside(error):
            raise
        say_error(f"{error}; run the same command again to resume")
        return FAILED
    if summary_file:
        write_json(Path(summary_file).expanduser(), summary)
    return DONE
