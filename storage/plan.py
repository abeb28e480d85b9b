"""The fields of plan.json: each with what it may be, checked once, when a dump is opened.

The storage reads few of them. The others are of the pipeline, which stands on them as they are.
Fields that are not listed here are left to who made the dump.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from storage.codec.grid import MAX_STEP
from storage.errors import CorruptShard, FormatVersionError
from storage.parsing import MOST, MOST_K, MOST_PARTITIONS, MOST_VOCAB, Json, wrong
from storage.samples import MOST_DRAWS

NAME = "plan.json"
TARGETS_VERSION = 1
DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float", "float64", "double")
"""Of a teacher's weights, as torch spells them."""


@dataclass(frozen=True)
class Field:
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]

    def or_null(self) -> "Field":
        return Field(f"{self.expected}, or null", lambda found: found is None or self.holds(found))


def whole(low: int, high: int) -> Field:
    return Field(
        f"a whole number from {low} to {high}",
        lambda found: type(found) is int and low <= found <= high,
    )


def number(expected: str, inside: Callable[[float], bool]) -> Field:
    return Field(expected, lambda found: type(found) in (int, float) and inside(found))


TEXT = Field("text", lambda found: isinstance(found, str) and bool(found))
OBJECT = Field("an object", lambda found: isinstance(found, dict))
TEXTS = Field(
    "a list of texts",
    lambda found: isinstance(found, list) and all(isinstance(each, str) for each in found),
)
BOOLEAN = Field("true or false", lambda found: isinstance(found, bool))
DTYPE = Field(f"one of {', '.join(DTYPES)}", lambda found: found in DTYPES)
TOKEN = whole(0, MOST_VOCAB).or_null()

ALWAYS = ("vocab_size", "partitions", "step")
FIELDS = {
    "vocab_size": whole(1, MOST_VOCAB),
    "partitions": whole(1, MOST_PARTITIONS),
    "step": number(f"nats between 0 and {MAX_STEP}", lambda found: 0 < found < MAX_STEP),
    "k": whole(0, MOST_K),
    "samples": whole(0, MOST_DRAWS),
    "sample_seed": whole(-(1 << 63), (1 << 63) - 1),
    "min_prob": number("a probability under 1", lambda found: 0 <= found < 1),
    "top_p": number("a probability above 0", lambda found: 0 < found <= 1),
    "codec": TEXT,
    "targets": OBJECT,
    "targets.version": whole(1, MOST),
    "targets.which": TEXT,
    "targets.positions": number("a share above 0", lambda found: 0 < found <= 1),
    "targets.positions_seed": whole(-(1 << 63), (1 << 63) - 1),
    "temperature": number("1, the only one", lambda found: found == 1),
    "max_length": whole(2, (1 << 31) - 1),
    "add_eos": BOOLEAN,
    "bos_token_id": TOKEN,
    "eos_token_id": TOKEN,
    "shard_tokens": whole(1, MOST),
    "teacher": OBJECT,
    "teacher.name": TEXT,
    "teacher.revision": TEXT.or_null(),
    "teacher.architectures": TEXTS,
    "teacher.fingerprint": TEXT,
    "teacher.config": OBJECT,
    "teacher.dtype": DTYPE,
    "tokenizer": OBJECT,
    "tokenizer.fingerprint": TEXT,
    "corpus": OBJECT,
    "corpus.path": TEXT,
    "corpus.column": TEXT,
    "corpus.documents": whole(1, MOST),
    "corpus.fingerprint": TEXT,
    "corpus.special_tokens": TEXT,
    "corpus.rendering": OBJECT,
    "corpus.rendering.sample": TEXT,
    "corpus.rendering.chat_template": OBJECT,
    "engine": OBJECT,
    "engine.name": TEXT,
    "engine.version": TEXT,
    "engine.args": OBJECT,
}
"""A dot leads into an object. All but `ALWAYS` may be absent: a dump need not be the pipeline's."""


def check_plan(plan: Json) -> None:
    """Raise CorruptShard, with the field, for a value that no writer can have made."""
    for name, field in FIELDS.items():
        found, there = look_up(plan, name)
        if (there or name in ALWAYS) and not field.holds(found):
            raise wrong(NAME, name, field.expected, found)
    entries = plan.get("k", 0) + plan.get("samples", 0)
    if entries > MOST_K:
        raise wrong(NAME, "k", f"at most {MOST_K} together with samples", entries)


def masked(plan: Json) -> bool:
    """Whether each row of the dump says which of its tokens are learnt."""
    return "targets" in plan


def shares_tables(plan: Json) -> bool:
    """Whether the rows of the dump are decoded with tables that many shards share."""
    return bool(plan.get("codec") == "v3")


def format_version(plan: Json) -> int:
    """That of a dump with this plan: releases that know no masks refuse version 2."""
    return 2 if masked(plan) else 1


def check_readable(plan: Json, place: str) -> None:
    """As check_plan; raise FormatVersionError for the plan of a dump of a later release at
    `place`."""
    found = check_version(plan, place)
    check_plan(plan)
    if found != format_version(plan):
        expected = "2 in a plan with targets, 1 without"
        raise wrong(NAME, "format_version", expected, found)
    if not masked(plan):
        return
    version = needed(plan, "targets.version")
    if version != TARGETS_VERSION:
        raise FormatVersionError(
            f"{place}: targets of version {version}, this release reads version "
            f"{TARGETS_VERSION}; use the release that wrote the dump"
        )


def check_version(values: Json, place: str) -> Any:
    """The `format_version` of a plan or manifest. Raises FormatVersionError for a later one."""
    found = values.get("format_version")
    if found not in (1, 2):
        raise FormatVersionError(
            f"{place}: format version {found}, this release reads versions 1 and 2; use the "
            "release that wrote the dump"
        )
    return found


def needed(plan: Json, name: str) -> Any:
    """A checked field that the reader cannot do without. Raises CorruptShard where it is absent."""
    found, there = look_up(plan, name)
    if not there:
        raise CorruptShard(
            f"{NAME}: {name}: expected {FIELDS[name].expected}, found nothing: the dumps of this "
            "pipeline have it; restore the file from a copy, or make the dump again"
        )
    return found


def look_up(plan: Json, name: str) -> tuple[Any, bool]:
    """(value, whether there is one) of a dotted name."""
    found: Any = plan
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return None, False
        found = found[part]
    return found, True
