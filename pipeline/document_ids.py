"""A different id for each document of a corpus."""

import hashlib
from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from storage.targets import Bools

IDS_AT_ONCE = 10_000


class DocumentIds:
    """Ids by document number: a document's own, or its number where it has none.

    Of documents with one id, such as ids that begin anew in each file, the first one keeps it; the
    others get their number behind it, as 7#1003.
    """

    def __init__(
        self,
        documents: int,
        own: Callable[[int, int], list[str | None]] | None,
        differ: bool = False,
    ) -> None:
        """`own` gives the ids that documents `start` to `stop` have; None where none has one.
        `differ`: it is known that no two of them are the same."""
        self.documents, self.own, self.differ = documents, own, differ

    def __call__(self, start: int, stop: int) -> list[str]:
        """The ids of documents `start` to `stop`."""
        found = self.given(start, stop)
        if self.differ:
            return found
        repeats, known = self.repeats
        for at in np.flatnonzero(repeats[start:stop]).tolist():
            found[at] += f"#{start + at}"
            while is_in(short_hash(found[at]), known):
                found[at] += "#"
        return found

    def given(self, start: int, stop: int) -> list[str]:
        """The ids as the corpus has them; two documents may have the same."""
        own = self.own(start, stop) if self.own else [None] * (stop - start)
        return [str(at if value is None else value) for at, value in enumerate(own, start)]

    @cached_property
    def repeats(self) -> tuple[Bools, npt.NDArray[np.uint64]]:
        """([documents]: whether an earlier document has the id; sorted hashes of all ids)."""
        repeats = np.zeros(self.documents, bool)
        if self.own is None:
            return repeats, np.zeros(0, np.uint64)
        spans = range(0, self.documents, IDS_AT_ONCE)
        ids = (
            each for at in spans for each in self.given(at, min(at + IDS_AT_ONCE, self.documents))
        )
        hashes = np.fromiter(map(short_hash, ids), np.uint64, self.documents)
        known, first = np.unique(hashes, return_index=True)
        repeats[:] = True
        repeats[first] = False
        return repeats, known


def short_hash(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_in(value: int, ordered: npt.NDArray[np.uint64]) -> bool:
    at = int(np.searchsorted(ordered, np.uint64(value)))
    return at < len(ordered) and int(ordered[at]) == value
