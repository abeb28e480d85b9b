"""Options that go to a library unchanged: checked against the types that the library declares.

transformers and peft take any value, and fail on a wrong one much later, with a word about neither
the option nor the value.
"""

from collections.abc import Callable
from contextlib import suppress
from types import UnionType
from typing import Any, Union, get_args, get_origin

import jsonargparse

from pipeline.errors import ConfigError


def typed(name: str, value: Any, hint: Any) -> Any:
    """The value as this type; text that spells a number becomes one. ConfigError for another."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    if isinstance(value, float) and value.is_integer() and hint is int:
        value = int(value)
    if value is not None or type(None) in get_args(hint):  # jsonargparse takes null for absent
        with suppress(jsonargparse.ArgumentError):
            return parser.parse_object({"value": value}).value
    raise ConfigError(f"{name}: expected {shown(hint)}, found {brief(value)}")


def shown(hint: Any) -> str:
    """A type in words, such as "str or list[str]"."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(shown(part) for part in get_args(hint) if part is not type(None))
    return hint.__name__ if type(hint) is type else str(hint)


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def blamed(make: Callable[..., object], given: dict[str, Any]) -> str:
    """The option without which `make` works, with a dot before its name; empty if there is none."""
    for name in reversed(given):
        with suppress(Exception):  # whatever the others make the library do
            make(**{other: value for other, value in given.items() if other != name})
            return f".{name}"
    return ""


def reason(error: Exception) -> str:
    """What a library says, in one line of bounded length."""
    return " ".join(str(error).split())[:400] or type(error).__name__
