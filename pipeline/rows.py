"""Parts of a packed row, as `data.batch_of` makes them: domain sequences first."""

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]


def domain_part(row: Json) -> Json:
    """A packed row without its general sequences."""
    labels, tokens = len(row["targets"]["labels"]), domain_tokens(row)
    if not labels:
        return without_targets(row)
    targets = {name: value[:0] for name, value in row["targets"].items()}
    targets |= {name: row["targets"][name][:labels] for name in ("rows", "labels")}
    return cut(row, slice(0, tokens), targets)


def general_part(row: Json) -> Json:
    """A packed row without its domain sequences."""
    labels, tokens = len(row["targets"]["labels"]), domain_tokens(row)
    if tokens == row["input_ids"].shape[1]:
        return without_targets(row)
    rows = row["targets"]["rows"][labels:] - tokens
    targets = row["targets"] | {"rows": rows, "labels": row["targets"]["labels"][:0]}
    return cut(row, slice(tokens, None), targets)


def domain_tokens(row: Json) -> int:
    """Tokens of a packed row's domain sequences, which come first."""
    labels = len(row["targets"]["labels"])
    return int(row["targets"]["rows"][labels - 1]) + 2 if labels else 0


def cut(row: Json, tokens: slice, targets: Json) -> Json:
    return {
        "input_ids": row["input_ids"][:, tokens],
        "position_ids": row["position_ids"][:, tokens],
        "sequence_lengths": list(lengths_within(row["sequence_lengths"], tokens)),
        "targets": targets,
    }


def lengths_within(lengths: list[int], tokens: slice) -> Iterator[int]:
    start = 0
    for length in lengths:
        if start >= (tokens.start or 0) and (tokens.stop is None or start < tokens.stop):
            yield length
        start += length


def without_targets(row: Json) -> Json:
    """The first sequence of a row, with nothing to learn from it."""
    targets = {name: value[:0] for name, value in row["targets"].items()}
    return cut(row, slice(0, row["sequence_lengths"][0]), targets)
