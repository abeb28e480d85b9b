"""What a dump has committed: one listing, then each marker once, many at the same time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from storage.parsing import MARKER_BYTES, Json, check_marker, check_summary, from_json
from storage.plan import masked, shares_tables
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
    def index(self) -> int:
        """Its number in its partition."""
        return int(self.name.split("/")[1])

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


class Committed:
    """The shards and partitions of a dump that one listing found; later ones do not appear.

    A file is read when it is first asked for, and once. Committed files never change. Raises
    CorruptShard for a marker that no writer can have made, and StoreError.
    """

    def __init__(self, store: Store, plan: Json, prefix: str = "") -> None:
        self.store, self.plan, self.partitions = store, plan, range(plan["partitions"])
        self.names = set(store.names(prefix))
        self._read: dict[str, bytes | None] = {}

    @property
    def incomplete(self) -> list[int]:
        """The partitions that are not complete."""
        return [index for index in self.partitions if complete(index) not in self.names]

    def summaries(self, partitions: Iterable[int] | None = None) -> list[Json | None]:
        """The contents of complete.json of these partitions, or of all; None for one without."""
        names = [complete(index) for index in self._these(partitions)]
        self._fetch(names)
        return [self._summary(name) for name in names]

    def shards(self, partitions: Iterable[int] | None = None) -> list[Shard]:
        """The shards of these partitions, or of all, in order; of each up to the first missing."""
        parts = [list(self._markers(index)) for index in self._these(partitions)]
        self._fetch(name for names in parts for name in names)
        return [shard for names in parts for shard in self._present(names)]

    def _these(self, partitions: Iterable[int] | None) -> list[int]:
        return list(self.partitions if partitions is None else partitions)

    def _markers(self, partition: int) -> Iterator[str]:
        index = 0
        while (name := f"{partition:05d}/{index:05d}.json") in self.names:
            yield name
            index += 1

    def _fetch(self, names: Iterable[str]) -> None:
        wanted = [name for name in names if name in self.names and name not in self._read]
        self._read |= self.store.read_many(wanted, MARKER_BYTES)

    def _summary(self, name: str) -> Json | None:
        data = self._read.get(name)
        return None if data is None else summary_of(data, name)

    def _present(self, names: list[str]) -> Iterator[Shard]:
        for name in names:
            data = self._read[name]
            if data is None:  # removed since the listing
                return
            yield shard_of(self.plan, name.removesuffix(".json"), from_json(data, name))


def shard_of(plan: Json, name: str, marker: Json) -> Shard:
    """The shard with this marker in a dump of this plan. Raises CorruptShard, see Shard."""
    return Shard(name, marker, masked(plan), shares_tables(plan))


def complete(partition: int) -> str:
    """The name of the file that says that all shards of a partition are committed."""
    return f"{partition:05d}/complete.json"


def summary_of(data: bytes, name: str) -> Json:
    """What complete.json says. Raises CorruptShard."""
    summary = from_json(data, name)
    check_summary(summary, name)
    return summary
