"""The range of each number among the settings: declared with its type, checked in one place.

k: Annotated[int, Range(0, 65535)] = 64
"""

import dataclasses
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; `above` and `below` are bounds that do not belong to it."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        """Never infinity, nor what is not a number."""
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and math.isfinite(value)

    def bound(self, value: float) -> str:
        """The bound that a value outside of the range breaks, in words."""
        if value < self.least:
            return f"at least {self.least:g}"
        if value <= self.above:
            return f"above {self.above:g}"
        if math.isfinite(value) and value > self.most:
            return f"at most {self.most:.0f}"
        if math.isfinite(value) and value >= self.below:
            return f"below {self.below:g}"
        return "a finite number"


def within(bounds: Range) -> Callable[[str], float]:
    """A type for argparse: a number in a range, a whole one where `least` is an int."""
    kind = int if isinstance(bounds.least, int) else float

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"expected a number, found {text[:40]!r}") from None
        if value not in bounds:
            raise ArgumentTypeError(f"{bounds.bound(value)}, found {text[:40]}")
        return value

    return number


def range_of(config: Any, name: str) -> Range | None:
    """The range that is declared with a field's type."""
    hint = get_type_hints(type(config), include_extras=True)[name]
    return next((part for part in getattr(hint, "__metadata__", ()) if type(part) is Range), None)


def check_ranges(config: Any, prefix: str = "") -> None:
    """ConfigError that names the first setting out of its range, those of parts too."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
            continue
        bounds = range_of(config, field.name)
        if bounds is not None:
            check(name, value, bounds)
        if isinstance(value, dict):
            for key, part in value.items():
                if dataclasses.is_dataclass(part):
                    check_ranges(part, f"{name}.{key}.")


def check(name: str, value: Any, bounds: Range) -> None:
    """ConfigError where a number, or one of a list or dict of numbers, is out of its range."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            check(name, part, bounds)
    elif isinstance(value, int | float) and value not in bounds:
        raise ConfigError(f"{name}: {bounds.bound(value)}, found {value}")
