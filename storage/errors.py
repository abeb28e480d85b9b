"""Everything that storage raises on purpose. Each message says what was expected, what was found
and what to do."""


class StorageError(Exception):
    """Base of all errors of this package."""


class InvalidRecord(StorageError):
    """A record that must not be stored: NaN, lengths that disagree, ids outside the vocabulary."""


class CorruptPayload(StorageError):
    """Encoded bytes that are cut short, damaged, or not ours."""


class CorruptShard(StorageError):
    """A data file that is not what its marker says."""


class FormatVersionError(StorageError):
    """Data of a format version that this release does not read."""


class PlanMismatch(StorageError):
    """A dump directory that already holds a dump made from another plan."""


class IncompleteDump(StorageError):
    """A dump whose partitions are not all there yet."""


class StoreError(StorageError):
    """A directory or object store that fails now: full, read-only, gone. What is committed stays,
    and the same command goes on when the cause is put right."""
