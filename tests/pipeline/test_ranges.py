"""Every number among the settings has a range, and what is outside of it is refused by name."""

import argparse
import dataclasses
import math
import runpy
import signal
import sys
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import (
    TRAINING,
    CorpusConfig,
    DumpConfig,
    EvalConfig,
    GenerateConfig,
    HeldOutConfig,
    TrainConfig,
)
from pipeline.errors import ConfigError
from pipeline.ranges import Range, check_ranges, range_of, within
from pipeline.study.config import ArmConfig, StudyConfig
from tests.helpers.paths import SCRIPTS


def corpus(**changes: Any) -> CorpusConfig:
    return CorpusConfig("c", **changes)


def held_out() -> HeldOutConfig:
    return HeldOutConfig(domain=corpus(), general=corpus())


SETTINGS: list[Any] = [
    DumpConfig(model="m", corpus=corpus(), output="o"),
    GenerateConfig(model="m", output="o", tokens=100, prompts=corpus()),
    TrainConfig(model="m", domain=corpus(), output="o", dump={"one": 1.0}, held_out=held_out()),
    EvalConfig(models={"base": "m"}, domain=corpus(), general=corpus(), other=corpus()),
    StudyConfig(
        model="m", domain=corpus(), general=corpus(), held_out=held_out(), output="o",
        arms={"mol": ArmConfig(seeds=[0], learning_rates=[0.1])},
    ),
]  # fmt: skip


def has_number(hint: Any) -> bool:
    """Whether the type takes a number, also in a list or dict of a known kind."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint in (int, float) or any(map(has_number, parts))


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    """(the part of the settings, its field, the full name) of every field that takes a number."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        parts = value if isinstance(value, dict) else {"": value}
        for key, part in parts.items():
            if dataclasses.is_dataclass(part):
                yield from numbers(part, f"{name}.{key}." if key else f"{name}.")
        if has_number(hints[field.name]):
            yield config, field.name, name


def named(value: Any) -> str | None:
    return value if isinstance(value, str) else None


FIELDS = [(top, *found) for top in SETTINGS for found in numbers(top)]


def test_the_walk_finds_numbers_everywhere() -> None:
    names = {name for *_, name in FIELDS}
    assert len(FIELDS) > 60
    assert {"k", "corpus.skip", "loss.alpha", "held_out.general.limit", "arms.mol.seeds"} <= names
    assert {"dump", "seeds", "measure.tail_k", "other.limit", "null_test.bound"} <= names


@pytest.mark.parametrize(("top", "part", "field", "name"), FIELDS, ids=named)
def test_every_number_has_a_range(
    top: Any, part: Any, field: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one must have one, too."""
    bounds = range_of(part, field)
    assert bounds is not None, f"{name}: give it a Range, as in Annotated[int, Range(1)]"
    usual = getattr(part, field)
    for wrong in [*outside(bounds), math.nan, math.inf]:
        value = [wrong] if isinstance(usual, list) else wrong
        value = {"one": wrong} if isinstance(usual, dict) else value
        monkeypatch.setattr(part, field, value)
        with pytest.raises(ConfigError, match=rf"^{name}: .*found {wrong}$"):
            check_ranges(top)
    monkeypatch.setattr(part, field, usual)
    check_ranges(top)


def outside(bounds: Range) -> list[float]:
    """The nearest numbers that do not belong to a range."""
    near = [(bounds.least, -1), (bounds.most, 1), (bounds.above, 0), (bounds.below, 0)]
    return [number + step for number, step in near if math.isfinite(number)]


@given(st.floats(), st.floats(), st.floats())
def test_a_range_is_what_it_says(value: float, low: float, high: float) -> None:
    assert (value in Range(low, high)) == (low <= value <= high and math.isfinite(value))
    inside = low < value < high and math.isfinite(value)
    assert (value in Range(above=low, below=high)) == inside


def test_the_broken_bound_is_said() -> None:
    bounds = Range(0, 65535)
    assert [bounds.bound(n) for n in (-1, 65536)] == ["at least 0", "at most 65535"]
    bounds = Range(above=0, below=0.5)
    assert [bounds.bound(n) for n in (0, 0.5, math.nan)] == [
        "above 0", "below 0.5", "a finite number",
    ]  # fmt: skip


def test_settings_are_checked_when_they_are_made() -> None:
    makers: list[tuple[Any, dict[str, Any], str]] = [
        (DumpConfig, {"model": "m", "corpus": corpus(skip=-3), "output": "o"},
         "corpus.skip: at least 0, found -3"),
        (GenerateConfig, {"model": "m", "output": "o", "tokens": 0}, "tokens"),
        (EvalConfig, {"models": {"base": "m"}, "domain": corpus(), "sequences": 0}, "sequences"),
        (TrainConfig, {"model": "m", "domain": corpus(), "output": "o", "mix": 0, "max_length": 1},
         "max_length: at least 2"),
    ]  # fmt: skip
    for kind, settings, words in makers:
        with pytest.raises(ConfigError, match=words):
            kind(**settings)


@pytest.mark.parametrize("name", TRAINING)
def test_numbers_of_transformers_have_ranges(name: str) -> None:
    def train(value: Any) -> None:
        TrainConfig("m", corpus(), "o", mix=0, max_length=64, training={name: value})

    train("auto")  # transformers says what it is
    for wrong in outside(TRAINING[name]):
        with pytest.raises(ConfigError, match=f"training.{name}: "):
            train(wrong)
        with pytest.raises(ConfigError, match=f"training.{name}: "):
            train(str(wrong))  # as YAML reads 1e-5
    assert name in transformers_arguments()


def transformers_arguments() -> set[str]:
    from transformers import TrainingArguments

    return {field.name for field in dataclasses.fields(TrainingArguments)}


def test_a_number_without_a_range_would_be_found() -> None:
    @dataclasses.dataclass
    class New:
        good: Annotated[int, Range(1)] = 1
        bad: int | None = None

    assert [range_of(part, field) for part, field, _ in numbers(New())][1] is None


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("dump_logits", ["--estimate", "0"]),
        ("dump_logits", ["--estimate=-5"]),
        ("dump_logits", ["--run_tokens", "0"]),
        ("dump_logits", ["--partition", "1/" + "9" * 5000]),
        ("dump_logits", ["--partition", "2/2"]),
        ("verify_dump", ["--sample", "0"]),
        ("verify_dump", ["--seed=-1"]),
        ("verify_dump", ["--bound", "nan"]),
    ],
)
def test_numbers_of_a_script_have_ranges(
    script: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    needed = ["--model=m", "--corpus.path=c", "--output=o"] if script == "dump_logits" else ["d"]
    monkeypatch.setattr("pipeline.signals.die_with_parent", lambda: None)
    main = runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"]
    monkeypatch.setattr(sys, "argv", [script, *needed, *words])
    before = {known: signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
    assert stopped.value.code == 2
    assert words[0].partition("=")[0] in capsys.readouterr().err


def test_a_number_on_the_command_line() -> None:
    assert within(Range(1, 9))("3") == 3
    assert within(Range(above=0.0))("0.5") == 0.5
    for text in ("0", "10", "x", "2.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            within(Range(1, 9))(text)
