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

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from storage.dump_tables import DumpTables
from storage.errors import IncompleteDump, PlanMismatch, StoreError
from storage.index_files import dump_index, joined
from storage.parsing import (
    MANIFEST_BYTES,
    MARKER_BYTES,
    PLAN_BYTES,
    SHA256,
    Json,
    check_marker,
    check_names,
    check_summary,
    from_json,
    matched,
    objects,
    to_json,
)
from storage.plan import check_readable, format_version, masked, shares_tables
from storage.store import Store


@dataclass(frozen=True)
class Shard:
    """A committed shard: its name ("00003/00007") and its marker, checked.

    masked  whether each of its rows says which of its tokens are learnt
    shared  whether its rows are decoded with tables of the dump, see dump_tables.py

    Raises CorruptShard for a marker that no writer can have made.
    """

    name: str
    marker: Json
    masked: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        check_marker(self.marker, self.name, self.masked, self.shared)

    @property
    def file(self) -> str:
        return f"{self.name.split('/')[0]}/{self.marker['file']}"

    @property
    def rows(self) -> int:
        return int(self.marker["rows"])

    @property
    def tokens(self) -> int:
        return int(self.marker["tokens"])

    @property
    def positions(self) -> int:
        return int(self.marker["positions"])

    @property
    def tables(self) -> str | None:
        """The sha256 of the tables of the dump that decode its rows; None if it holds its own."""
        return self.marker.get("tables") if self.shared else None

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows and tokens and, if `masked`, positions: what an index counts."""
        counts = self.rows, self.tokens
        return (*counts, self.positions) if self.masked else counts


@dataclass(frozen=True)
class Totals:
    """Sums over the markers of committed shards.

    shards        markers counted
    rows, tokens  stored rows and their input ids
    positions     distributions: as many as there are targets
    entries       kept ids of all positions
    bytes         of the data files
    mass          probability of the kept ids, summed over positions
    kl_sum        KL in nats that the codec costs, summed over positions
    kl_max        the largest such KL of one position
    documents     0 unless the markers count them, as those of the pipeline do
    sampled_ids   different ids drawn from the tails; 0 without samples
    sample_bytes  of the encoded samples; 0 without samples
    """

    shards: int = 0
    rows: int = 0
    tokens: int = 0
    positions: int = 0
    entries: int = 0
    bytes: int = 0
    mass: float = 0.0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    documents: int = 0
    sampled_ids: int = 0
    sample_bytes: int = 0

    @classmethod
    def of(cls, markers: Iterable[Json]) -> "Totals":
        """Add up these markers; no markers give zeros."""
        found = list(markers)

        def total(name: str) -> int:
            return sum(int(marker[name]) for marker in found)

        def optional(name: str) -> int:
            return sum(int(marker.get(name, 0)) for marker in found)

        return cls(
            shards=len(found),
            rows=total("rows"),
            tokens=total("tokens"),
            positions=total("positions"),
            entries=total("entries"),
            bytes=total("bytes"),
            mass=sum((float(marker["mass"]) for marker in found), 0.0),
            kl_sum=sum((float(marker["kl_sum"]) for marker in found), 0.0),
            kl_max=max((float(marker["kl_max"]) for marker in found), default=0.0),
            documents=optional("documents"),
            sampled_ids=optional("sampled_ids"),
            sample_bytes=optional("sample_bytes"),
        )

    @property
    def bytes_per_token(self) -> float | None:
        """None without tokens."""
        return self.bytes / self.tokens if self.tokens else None

    @property
    def bytes_per_target(self) -> float | None:
        """None without positions."""
        return self.bytes / self.positions if self.positions else None

    @property
    def kept_mass(self) -> float | None:
        """Mean probability of a position's kept ids; None without positions."""
        return self.mass / self.positions if self.positions else None

    @property
    def codec_kl(self) -> float | None:
        """Mean KL in nats that the codec costs a position; None without positions."""
        return self.kl_sum / self.positions if self.positions else None


@dataclass(frozen=True)
class Manifest:
    """A finished dump: plan, shards and partition summaries in order, sha256 of manifest.json."""

    plan: Json
    shards: tuple[Shard, ...]
    partitions: tuple[Json, ...]
    fingerprint: str

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
        found: list[Shard] = []
        with contextlib.suppress(IncompleteDump):
            while True:
                found.append(self.shard(len(found)))
        return found

    def shard(self, index: int) -> Shard:
        """One committed shard. Raises IncompleteDump if it is not committed."""
        name = f"{self.name}/{index:05d}"
        data = self.dump.store.read(f"{name}.json", MARKER_BYTES)
        if data is None:
            raise IncompleteDump(f"{name}.json: not committed yet")
        return self.dump.committed(name, from_json(data, f"{name}.json"))

    @property
    def summary(self) -> Json | None:
        """Contents of complete.json, or None while the partition is not complete."""
        name = f"{self.name}/complete.json"
        data = self.dump.store.read(name, MARKER_BYTES)
        if data is None:
            return None
        summary = from_json(data, name)
        check_summary(summary, name)
        return summary

    def finish(self, summary: Json) -> None:
        """Mark the partition complete: no more shards follow. `summary` adds entries."""
        shards = self.shards
        marker = {
            **summary,
            "shards": len(shards),
            "rows": sum(shard.rows for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
        }
        self.dump.store.create(f"{self.name}/complete.json", to_json(marker))


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
        return Shard(name, marker, masked(self.plan), shares_tables(self.plan))

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
        return [shard for partition in self.partitions for shard in partition.shards]

    def finish(self) -> Manifest:
        """Write the index and manifest.json.

        Raises IncompleteDump that names the missing partitions. A dump with shards of a release
        that wrote no indexes gets none here, see `scan.index_dump`.
        """
        summaries = [partition.summary for partition in self.partitions]
        missing = [str(index) for index, summary in enumerate(summaries) if summary is None]
        if missing:
            raise IncompleteDump(
                f"{self.store.path}: {len(missing)} of {len(summaries)} partitions are not "
                f"complete: {', '.join(missing[:20])}; run scripts/dump_logits.py for them"
            )
        shards = self.shards()
        body = {
            "format_version": format_version(self.plan),
            "plan_sha256": self.plan_sha256,
            "partitions": summaries,
            "shards": [{"name": shard.name, **shard.marker} for shard in shards],
            "rows": sum(shard.rows for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
        }
        data = to_json(body)
        fingerprint = hashlib.sha256(data).hexdigest()
        if not self.store.exists(dump_index(fingerprint)):
            files = [(shard.file, str(shard.marker["sha256"])) for shard in shards]
            masks = masked(self.plan)
            index = joined(self.store, files, fingerprint, self.plan_sha256, masks)
            if index is not None:
                self.store.create(dump_index(fingerprint), index)
        self.store.create("manifest.json", data)
        return self.manifest()

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
        plan = matched(body, "plan_sha256", "manifest.json", SHA256, "64 hexadecimal digits")
        if plan[0] != self.plan_sha256:
            raise PlanMismatch(
                f"{self.store.path}: manifest.json belongs to another plan.json; restore the file "
                "that was replaced"
            )
        entries = objects(body, "shards", "manifest.json")
        check_names([entry.get("name") for entry in entries], self.plan["partitions"])
        shards = tuple(self.committed(entry.pop("name"), entry) for entry in entries)
        summaries = objects(body, "partitions", "manifest.json")
        for summary in summaries:
            check_summary(summary, "manifest.json")
        fingerprint = hashlib.sha256(data).hexdigest()
        return Manifest(self.plan, shards, tuple(summaries), fingerprint)


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
    store.create("plan.json", to_json(plan))
    dump = Dump(path)
    lines = (compare or differences)(dump.plan, json.loads(to_json(plan)))
    if lines:
        raise PlanMismatch(
            f"{dump.store.path} holds a dump made from another plan:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nUse the old settings to resume it, or choose another output directory."
        )
    for name, data in (tokenizer_files or {}).items():
        if not store.exists(f"tokenizer/{name}"):
            store.create(f"tokenizer/{name}", data)
    return dump


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
