"""What verify checks of the files that hold no rows: plan.json, manifest.json, complete.json, the
tokenizer's files and the indexes of partitions.

Each fault is one line that begins with the name of the file.
"""

import hashlib
from collections.abc import Iterator, Sequence, Set

from storage.committed import complete, summary_of
from storage.errors import StorageError, StoreError
from storage.index import parts_of
from storage.index_files import PARTITION_INDEX_BYTES, checked, partition_index, shards_key
from storage.manifest import TOKENIZER, TOKENIZER_BYTES, Dump, Manifest, Shard
from storage.parsing import MARKER_BYTES, PLAN_BYTES, Json, from_json, to_json
from storage.plan import masked


def small_faults(
    dump: Dump,
    data: bytes | None,
    manifest: Manifest | None,
    shards: Sequence[Shard],
    names: Set[str],
) -> list[str]:
    """The faults of these files. `data` is manifest.json, None for a dump that is not finished;
    `names` are the files of the dump. Raises StoreError."""
    plan = dump.store.read("plan.json", PLAN_BYTES)
    faults = list(rewritten("plan.json", plan, dump.plan))
    if data is not None and manifest is not None:
        faults += manifest_faults(data, shards)
        faults += tokenizer_faults(dump, manifest)
    return faults + partition_faults(dump, manifest, shards, names)


def rewritten(name: str, data: bytes | None, values: Json) -> Iterator[str]:
    """A file that says the same in other bytes than a writer gives it."""
    if data != to_json(values):
        yield f"{name}: other bytes than its writer gave it: the file was changed"


def manifest_faults(data: bytes, shards: Sequence[Shard]) -> Iterator[str]:
    """What is wrong with a manifest that can be read."""
    body = from_json(data, "manifest.json")
    yield from rewritten("manifest.json", data, body)
    for key, total in (
        ("rows", sum(s.rows for s in shards)),
        ("tokens", sum(s.tokens for s in shards)),
    ):
        if (found := body.get(key)) != total:
            yield f"manifest.json: {key}: expected {total}, as its shards have, found {found!r}"


def tokenizer_faults(dump: Dump, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the tokenizer's files, by the sha256s of the manifest."""
    for name, sha256 in manifest.tokenizer.items():
        file = TOKENIZER + name
        try:
            data = dump.store.read(file, TOKENIZER_BYTES)
        except StoreError:
            raise
        except StorageError as error:
            yield str(error)
            continue
        if data is None:
            yield f"{file}: missing, though manifest.json names it; restore it from a copy"
        elif hashlib.sha256(data).hexdigest() != sha256:
            yield (
                f"{file}: the sha256 is not that of manifest.json: the file was changed after the "
                "dump was finished; restore it from a copy"
            )


def partition_faults(
    dump: Dump, manifest: Manifest | None, shards: Sequence[Shard], names: Set[str]
) -> list[str]:
    """What is wrong with complete.json and complete.index of partitions."""
    number = int(dump.plan["partitions"])
    if manifest is not None and (there := len(manifest.partitions)) != number:
        return [f"manifest.json: expected {number} partitions, as plan.json has, found {there}"]
    by_partition: dict[int, list[Shard]] = {index: [] for index in range(number)}
    for shard in shards:
        by_partition[int(shard.name.split("/")[0])].append(shard)
    wanted = [complete(index) for index in by_partition if manifest or complete(index) in names]
    try:
        found = dump.store.read_many(wanted, MARKER_BYTES)
    except StoreError:
        raise
    except StorageError as error:
        return [str(error)]
    faults: list[str] = []
    for index, own in by_partition.items():
        copy = None if manifest is None else manifest.partitions[index]
        try:
            if complete(index) in found:
                faults += summary_faults(complete(index), found[complete(index)], own, copy)
            if partition_index(index) in names:
                check_index(dump, partition_index(index), own)
        except StoreError:
            raise
        except StorageError as error:
            faults.append(str(error))
    return faults


def summary_faults(
    name: str, data: bytes | None, shards: Sequence[Shard], copy: Json | None
) -> Iterator[str]:
    """What is wrong with complete.json; `copy` is what the manifest has of it. Raises
    CorruptShard."""
    if data is None:
        yield f"{name}: missing; restore it from a copy"
        return
    summary = summary_of(data, name)
    if copy is not None and data != to_json(copy):
        yield f"{name}: it differs from its copy in manifest.json"
        return
    yield from rewritten(name, data, summary)
    expected = [len(shards), sum(s.rows for s in shards), sum(s.tokens for s in shards)]
    for key, total in zip(("shards", "rows", "tokens"), expected, strict=True):
        if summary[key] != total:
            yield f"{name}: {key}: expected {total}, as the markers say, found {summary[key]}"


def check_index(dump: Dump, name: str, shards: Sequence[Shard]) -> None:
    """Raise CorruptIndex for a damaged index of a partition."""
    data = dump.store.read(name, PARTITION_INDEX_BYTES)
    if data is not None:
        key = shards_key(str(shard.marker["sha256"]) for shard in shards)
        parts_of(checked(data, name, key, dump.plan_sha256, masked(dump.plan), len(shards)))
