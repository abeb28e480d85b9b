"""Plan, markers and manifest: the files that say what is committed.

Each of them is created once, whole, and only if it does not exist yet. So the first writer wins,
and any process may die at any time. Readers use only data files that a marker names.

    plan.json             corpus, model and settings; created before any shard
    tokenizer/...         the tokenizer's files
    tables-9f1c….bin      tables that shards of version 3 share, see dump_tables.py
    00003/00007.json      marker of shard 7 of partition 3: data file, sha256, rows, tokens, cursor
    00003/00007-*.parquet data files; only the one that the marker names is read
    00003/complete.json   all shards of partition 3 are committed
    manifest.json         all partitions are complete

The indexes beside them are derived data, see index_files.py.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from storage.committed import Committed, Shard, Totals, complete, shard_of, summary_of
from storage.dump_tables import DumpTables
from storage.errors import CorruptShard, IncompleteDump, PlanMismatch, StoreError
from storage.index_files import dump_index, joined, partition_index, shards_key
from storage.parsing import (
    MANIFEST_BYTES,
    MARKER_BYTES,
    PLAN_BYTES,
    SHA256,
    Json,
    check_names,
    check_summary,
    from_json,
    matched,
    objects,
    to_json,
    wrong,
)
from storage.plan import check_readable, check_version, format_version, masked
from storage.store import Store

__all__ = ["Dump", "Manifest", "Partition", "Shard", "Totals", "create_dump", "differences"]

TOKENIZER, TOKENIZER_BYTES = "tokenizer/", 256 << 20  # most that is read of a file
TOKENIZER_FILE = re.compile(r"tokenizer/(?!\.)[^/\x00]+")  # others are those of writers
BLOCK, BLOCKS = 100, 1024  # shards whose names begin alike; blocks that most partitions stay under


@dataclass(frozen=True)
class Manifest:
    """A finished dump: plan, shards and partition summaries in order, sha256 of manifest.json, and
    sha256 of the tokenizer's files by their names; none where an earlier release finished it."""

    plan: Json
    shards: tuple[Shard, ...]
    partitions: tuple[Json, ...]
    fingerprint: str
    tokenizer: Json = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(int(shard.marker["bytes"]) for shard in self.shards)


class Partition:
    """One unit of retry: shards that one run of stage one writes in order."""

    def __init__(self, dump: "Dump", index: int) -> None:
        self.dump, self.index, self.name = dump, index, f"{index:05d}"

    @property
    def shards(self) -> list[Shard]:
        """The shards committed now, in order; reads their markers again."""
        return self.dump.now(f"{self.name}/").shards([self.index])

    def latest(self, most: int = 1) -> list[Shard]:
        """The last of the shards committed now, at most `most`, in order.

        Takes 12 requests and one for each, however many shards there are: their numbers have no
        gap, so the block of the last one is found by halves, and only that block is listed. Where
        a marker was lost, they may be shards before or behind that one.
        """
        low, high = 0, BLOCKS
        while self.marker(high * BLOCK) is not None:
            low, high = high, 2 * high
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.marker(middle * BLOCK) is None else (middle, high)
        names = set(self.dump.store.names(f"{self.name}/{low * BLOCK:05d}"[:-2]))
        index = low * BLOCK
        while f"{self.name}/{index:05d}.json" in names:
            index += 1
        return [self.shard(number) for number in range(max(0, index - most), index)]

    @property
    def next(self) -> int:
        """The number of the shard after the last one committed now, see `latest`."""
        latest = self.latest()
        return latest[-1].index + 1 if latest else 0

    def marker(self, index: int) -> bytes | None:
        """The marker of a shard; None if it is not committed."""
        return self.dump.store.read(f"{self.name}/{index:05d}.json", MARKER_BYTES)

    def shard(self, index: int) -> Shard:
        """One committed shard. Raises IncompleteDump if it is not committed."""
        name = f"{self.name}/{index:05d}"
        data = self.marker(index)
        if data is None:
            raise IncompleteDump(f"{name}.json: not committed yet")
        return self.dump.committed(name, from_json(data, f"{name}.json"))

    @property
    def summary(self) -> Json | None:
        """Contents of complete.json, or None while the partition is not complete."""
        name = complete(self.index)
        data = self.dump.store.read(name, MARKER_BYTES)
        return None if data is None else summary_of(data, name)

    def finish(self, summary: Json, shards: Sequence[Shard] | None = None) -> None:
        """Mark the partition complete: no more shards follow. `summary` adds entries.

        `shards` are those of the partition, if they are known. Of a remote dump, their indexes are
        joined before, so that `Dump.finish` need not ask for each.
        """
        shards = self.shards if shards is None else shards
        marker = {
            **summary,
            "shards": len(shards),
            "rows": sum(shard.rows for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
        }
        if not self.dump.store.local:
            self.join(shards)
        self.dump.store.create(complete(self.index), to_json(marker))

    def join(self, shards: Sequence[Shard]) -> None:
        """Create the index of the partition, if its shards have theirs."""
        key = shards_key(str(shard.marker["sha256"]) for shard in shards)
        names = set(self.dump.store.names(f"{self.name}/"))
        index = self.dump.joined(shards, names, key)
        if index is not None:
            self.dump.store.create(partition_index(self.index), index)


class Dump:
    """A dump directory, finished or not.

    Raises IncompleteDump without plan.json, FormatVersionError for another format version,
    CorruptShard for a plan with impossible values.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.store = Store(path)
        data = self.store.read("plan.json", PLAN_BYTES)
        if data is None:
            raise IncompleteDump(
                f"{self.store.path}: no plan.json, so this is not a dump; check the path, or make "
                "a dump with scripts/dump_logits.py"
            )
        self.plan = from_json(data, "plan.json")
        check_readable(self.plan, self.store.path)
        self.plan_sha256 = hashlib.sha256(to_json(self.plan)).hexdigest()
        self.tables = DumpTables(self.store, int(self.plan["vocab_size"]))

    def committed(self, name: str, marker: Json) -> Shard:
        """The shard with this marker. Raises CorruptShard, see Shard."""
        return shard_of(self.plan, name, marker)

    def check_plan(self) -> None:
        """Raise StoreError if plan.json is gone, PlanMismatch if it has changed.

        A directory that was removed, or reused for another dump, must not get shards of this one.
        """
        data = self.store.read("plan.json", PLAN_BYTES)
        if data is None:
            raise StoreError(
                f"{self.store.path}: plan.json is gone. Was the directory removed or unmounted "
                "during the run? Restore it, or start again"
            )
        if data != to_json(self.plan):
            raise PlanMismatch(
                f"{self.store.path}: plan.json has changed during the run: the directory holds "
                "another plan now; choose another output directory"
            )

    def partition(self, index: int) -> Partition:
        if not 0 <= index < self.plan["partitions"]:
            raise IncompleteDump(
                f"partition {index}: the plan has {self.plan['partitions']} partitions, numbered "
                "from 0"
            )
        return Partition(self, index)

    @property
    def partitions(self) -> list[Partition]:
        return [self.partition(index) for index in range(self.plan["partitions"])]

    def shards(self) -> list[Shard]:
        """All shards committed now, in order."""
        return self.now().shards()

    def now(self, prefix: str = "") -> Committed:
        """What is committed now, of a partition where `prefix` is its folder, such as "00003/"."""
        return Committed(self.store, self.plan, prefix)

    def finish(self, committed: Committed | None = None) -> Manifest:
        """Write the index and manifest.json; `committed` is what is there, if it is known.

        Raises IncompleteDump that names the missing partitions, CorruptShard where a complete one
        lacks a marker. A dump with shards of a release that wrote no indexes gets none here, see
        `scan.index_dump`.
        """
        committed = self.now() if committed is None else committed
        summaries = committed.summaries()
        missing = [str(index) for index, summary in enumerate(summaries) if summary is None]
        if missing:
            raise IncompleteDump(
                f"{self.store.path}: {len(missing)} of {len(summaries)} partitions are not "
                f"complete: {', '.join(missing[:20])}; run scripts/dump_logits.py for them"
            )
        shards = committed.shards()
        check_numbers(shards, summaries)
        there = "manifest.json" in committed.names  # perhaps of a release that wrote fewer keys
        tokenizer = {} if there else self.tokenizer_sha256(committed.names)
        body = {
            "format_version": format_version(self.plan),
            "plan_sha256": self.plan_sha256,
            "partitions": summaries,
            "shards": [{"name": shard.name, **shard.marker} for shard in shards],
            "rows": sum(shard.rows for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            **({"tokenizer_sha256": tokenizer} if tokenizer else {}),
        }
        data = self.manifest_bytes() if there else to_json(body)
        fingerprint = hashlib.sha256(data).hexdigest()
        if dump_index(fingerprint) not in committed.names:
            index = self.joined(shards, committed.names, fingerprint)
            if index is not None:
                self.store.create(dump_index(fingerprint), index)
        self.store.create("manifest.json", data)
        return self.manifest()

    def tokenizer_sha256(self, names: Iterable[str]) -> Json:
        """The sha256 of the tokenizer's files, as far as they are among the `names` of the store.

        Raises CorruptShard for a file of more than TOKENIZER_BYTES.
        """
        files = [name for name in names if TOKENIZER_FILE.fullmatch(name)]
        found = self.store.read_many(sorted(files), TOKENIZER_BYTES)
        return {
            name.removeprefix(TOKENIZER): hashlib.sha256(data).hexdigest()
            for name, data in found.items()
            if data is not None
        }

    def joined(self, shards: Sequence[Shard], names: Set[str], key: str) -> bytes | None:
        """The index over these shards, see `index_files.joined`."""
        files = [(shard.file, str(shard.marker["sha256"])) for shard in shards]
        return joined(self.store, files, names, key, self.plan_sha256, masked(self.plan))

    def manifest(self) -> Manifest:
        """The finished dump.

        Raises IncompleteDump without manifest.json, PlanMismatch if it belongs to another plan,
        CorruptShard for impossible values.
        """
        return self.parsed(self.manifest_bytes())

    def manifest_bytes(self) -> bytes:
        """manifest.json. Raises IncompleteDump without it."""
        data = self.store.read("manifest.json", MANIFEST_BYTES)
        if data is None:
            raise IncompleteDump(
                f"{self.store.path}: no manifest.json, so the dump is not finished; run "
                "scripts/dump_logits.py again with the same config to resume it"
            )
        return data

    def parsed(self, data: bytes) -> Manifest:
        """The manifest with these bytes; raises as `manifest`."""
        body = from_json(data, "manifest.json")
        version = check_version(body, "manifest.json")
        plan = matched(body, "plan_sha256", "manifest.json", SHA256, "64 hexadecimal digits")
        if plan[0] != self.plan_sha256:
            raise PlanMismatch(
                f"{self.store.path}: manifest.json belongs to another plan.json; restore the file "
                "that was replaced"
            )
        if version != format_version(self.plan):
            expected = f"{format_version(self.plan)}, as in plan.json"
            raise wrong("manifest.json", "format_version", expected, version)
        entries = objects(body, "shards", "manifest.json")
        check_names([entry.get("name") for entry in entries], self.plan["partitions"])
        shards = tuple(self.committed(entry.pop("name"), entry) for entry in entries)
        summaries = objects(body, "partitions", "manifest.json")
        for summary in summaries:
            check_summary(summary, "manifest.json")
        tokenizer = body.get("tokenizer_sha256", {})
        check_tokenizer(tokenizer)
        fingerprint = hashlib.sha256(data).hexdigest()
        return Manifest(self.plan, shards, tuple(summaries), fingerprint, tokenizer)


def create_dump(
    path: str | os.PathLike[str],
    plan: Json,
    tokenizer_files: dict[str, bytes] | None = None,
    compare: Callable[[Json, Json], list[str]] | None = None,
) -> Dump:
    """Start a dump, or open the existing one if its plan is the same.

    `tokenizer_files` maps names to contents; only a dump of this plan gets them. `compare` gives a
    line for each difference between the existing plan and this one that forbids to resume; by
    default any difference does. Raises PlanMismatch that lists every difference if the directory
    holds a dump made from another plan, CorruptShard for a plan with impossible values, and
    StoreError.
    """
    plan = {"format_version": format_version(plan), **plan}
    store = Store(path)
    check_readable(plan, store.path)
    store.make_root()
    if store.read("plan.json", PLAN_BYTES) is None:
        store.create("plan.json", to_json(plan))
    dump = Dump(path)
    lines = (compare or differences)(dump.plan, json.loads(to_json(plan)))
    if lines:
        raise PlanMismatch(
            f"{dump.store.path} holds a dump made from another plan:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nUse the old settings to resume it, or choose another output directory."
        )
    there = store.names(TOKENIZER) if tokenizer_files else []
    for name, data in (tokenizer_files or {}).items():
        if TOKENIZER + name not in there:
            store.create(TOKENIZER + name, data)
    return dump


def check_tokenizer(found: Any) -> None:
    """Raise CorruptShard unless these are sha256s by names of files of the tokenizer."""
    good = isinstance(found, dict) and all(
        TOKENIZER_FILE.fullmatch(TOKENIZER + name)
        and isinstance(sha256, str)
        and SHA256.fullmatch(sha256)
        for name, sha256 in found.items()
    )
    if not good:
        expected = "the sha256 of each file of the tokenizer, by its name"
        raise wrong("manifest.json", "tokenizer_sha256", expected, found)


def check_numbers(shards: Sequence[Shard], summaries: Sequence[Json | None]) -> None:
    """Raise CorruptShard if a complete partition has fewer shards than it says."""
    found = Counter(shard.name.split("/")[0] for shard in shards)
    for index, summary in enumerate(summaries):
        number = found[f"{index:05d}"]
        if summary is not None and number != summary["shards"]:
            raise CorruptShard(
                f"{complete(index)}: expected markers of {summary['shards']} shards, found "
                f"{number}: restore {index:05d}/{number:05d}.json from a copy or, to write the "
                f"shards from there on again, remove {complete(index)} and run the dump again"
            )


def differences(there: Any, here: Any, name: str = "", place: str = "dump") -> list[str]:
    """One readable line for each value that differs between two JSON values."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in sorted({*there, *here})
            for line in differences(
                there.get(key), here.get(key), f"{name}.{key}".lstrip("."), place
            )
        ]
    return [] if there == here else [f"{name}: {there!r} in the {place}, {here!r} asked for"]
