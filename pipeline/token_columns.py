"""Documents that are token ids already, with a mask or labels that say which tokens are learnt.

No number is converted that is not whole, and no id is left that is no token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.types import Int32s, Int64s
from storage.targets import Bools

Marked = tuple[Int32s, Bools | None]
"""Token ids [T]; bool [T], which of them are learnt, or None for all."""
Wrong = Callable[[str], ConfigError]
"""An error that names the file and the row, or the document."""

IGNORED = -100  # the label of a token that is not learnt, as for PyTorch's cross-entropy
LONGEST = 1 << 22  # tokens of a document


@dataclass(frozen=True)
class TokenColumns:
    """A column of token ids, and that of their mask or labels.

    A mask has 1 (or true) for each learnt token, and 0. Labels have the token's own id, or −100;
    they are those of a column with label in its name.
    """

    tokens: str
    mask: str | None
    vocabulary: int
    """The tokenizer's ids are below it."""

    @property
    def holds_labels(self) -> bool:
        return self.mask is not None and "label" in self.mask.lower()

    @property
    def names(self) -> list[str]:
        return [name for name in (self.tokens, self.mask) if name is not None]

    def of_arrow(self, row: Sequence[pa.Scalar], wrong: Wrong) -> Marked:
        """One document, from its value in each of the columns. Raises `wrong` with what is."""
        named = zip(row, self.names, strict=True)
        return self.marked([flat(value, name, wrong) for value, name in named], wrong)

    def of_json(self, row: dict[str, Any], wrong: Wrong) -> Marked:
        """One document, from its JSON object."""
        return self.marked([flat_json(row[name], name, wrong) for name in self.names], wrong)

    def marked(self, arrays: list[pa.Array], wrong: Wrong) -> Marked:
        tokens, *mask = arrays
        ids = numbers(tokens, self.tokens, wrong)
        at = first((ids < 0) | (ids >= self.vocabulary))
        if at is not None:
            raise wrong(
                f"id {ids[at]} at token {at} of {self.tokens!r} is no token: the tokenizer's ids "
                f"are 0 to {self.vocabulary - 1}. Was the corpus made with another tokenizer?"
            )
        if self.mask is None:
            return ids.astype(np.int32), None
        marks = numbers(mask[0], self.mask, wrong, bools=not self.holds_labels)
        if len(marks) != len(ids):
            raise wrong(
                f"{len(ids)} tokens in {self.tokens!r}, but {len(marks)} marks in {self.mask!r}; "
                "expected one for each token"
            )
        targets = self.of_labels(ids, marks, wrong) if self.holds_labels else self.of(marks, wrong)
        return ids.astype(np.int32), targets

    def of(self, marks: Int64s, wrong: Wrong) -> Bools:
        """The targets of a mask."""
        at = first((marks != 0) & (marks != 1))
        if at is not None:
            raise wrong(
                f"expected 0 or 1 in the mask {self.mask!r}, found {marks[at]} at token {at}. "
                "Labels are read from a column with label in its name"
            )
        return marks == 1

    def of_labels(self, ids: Int64s, labels: Int64s, wrong: Wrong) -> Bools:
        """The targets of labels. Labels that are shifted by one are refused."""
        found = labels != IGNORED
        at = first(found & (labels != ids))
        if at is None:
            return found
        is_shifted = bool((labels[:-1] == ids[1:])[found[:-1]].all())
        raise wrong(
            f"label {labels[at]} at token {at} of {self.mask!r}, which is {ids[at]} in "
            f"{self.tokens!r}; expected the same id, or {IGNORED}"
            + (
                ". These are the labels of the tokens that follow. Shift them back by one: a "
                "label stands at its own token"
                if is_shifted
                else ""
            )
        )


def numbers(values: pa.Array, column: str, wrong: Wrong, bools: bool = False) -> Int64s:
    """Whole numbers [T] of one document; with `bools`, also true and false, as 1 and 0."""
    if len(values) > LONGEST:
        raise wrong(f"document of more than {LONGEST:,} tokens, the most that is read. Divide it")
    if pa.types.is_null(values.type) and not len(values):
        return np.zeros(0, np.int64)
    if values.null_count:
        at = first(values.is_null().to_numpy(zero_copy_only=False))
        raise wrong(f"expected whole numbers in column {column!r}, found null at token {at}")
    if bools and pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if not pa.types.is_integer(values.type):
        kind = str(values.type)[:60]
        raise wrong(f"expected whole numbers in column {column!r}, found a list of {kind}")
    try:
        found: Int64s = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        raise wrong(f"column {column!r} has a number of 2**63 or more") from None
    return found


def first(found: Bools) -> int | None:
    """The first place that is true."""
    at = int(found.argmax()) if len(found) else 0
    return at if at < len(found) and found[at] else None


def is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def flat(value: pa.Scalar, column: str, wrong: Wrong) -> pa.Array:
    """The elements of one row of a column of lists."""
    if not is_list(value.type) or not value.is_valid:
        kind = str(value.type)[:60] if value.is_valid else "null"
        raise wrong(f"expected a list of whole numbers in column {column!r}, found {kind}")
    return value.values


def flat_json(value: Any, column: str, wrong: Wrong) -> pa.Array:
    """The elements of a list of JSON."""
    if not isinstance(value, list):
        kind = "null" if value is None else type(value).__name__
        raise wrong(f"expected a list of whole numbers in column {column!r}, found {kind}")
    try:
        return pa.array(value)
    except (pa.ArrowException, OverflowError):  # of several types, or too large
        at = next((at for at, each in enumerate(value) if type(each) is not int), 0)
        raise wrong(
            f"expected whole numbers below 2**63 in column {column!r}, found {value[at]!r:.40} at "
            f"token {at}"
        ) from None
