"""The errors of storage. Each message says what was expected, what was found and what to do."""

from storage.text import printable


class StorageError(Exception):
    """Base of all errors of this package. Text of a dump in their messages is safe to print."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InvalidRecord(StorageError):
    """A record that must not be stored: NaN, lengths that disagree, ids outside the vocabulary."""


class CorruptPayload(StorageError):
    """Encoded bytes that are cut short, damaged, or not a payload."""


class CorruptShard(StorageError):
    """A data file, marker or manifest that is damaged, missing, or not what was committed."""


class CorruptIndex(StorageError):
    """An index that is damaged, or is not that of its dump. The rows can be read without it."""


class Unindexable(StorageError):
    """A shard whose rows have no place in its file, because another writer compressed them."""


class FormatVersionError(StorageError):
    """Data of a format version that this release cannot read or write."""


class PlanMismatch(StorageError):
    """A dump directory that holds a dump made from another plan."""


class IncompleteDump(StorageError):
    """A dump that is missing or not finished."""


class StoreError(StorageError):
    """A directory or object store that fails: full, read-only, gone.

    Committed shards are kept. Fix the cause and run the same command again to resume.
    """
