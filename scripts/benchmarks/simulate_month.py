"""A month of a dump by a thousand workers that are preempted, in minutes.

    PYTHONPATH=. python scripts/benchmarks/simulate_month.py --seed 0

Discrete events on a virtual clock. The code of the commit is the real one: `create_dump`,
`what_is_missing`, `PartitionsWriter`, `ShardWriter`, `Dump.finish` and `gc` write tiny rows to a
store in memory that is slow, loses requests and answers, does some twice and refuses others.
Machines are preempted at random instants and at random requests. Some that the scheduler gives up
live on as orphans and go on writing; some of these freeze before. A scheduler hands the partitions
of lost machines to others. At the end each row is compared with what it must be.
"""

import argparse
import contextlib
import hashlib
import io
import random
import sys
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
from simulated_store import Bucket, Faults, SimulatedFileSystem
from virtual_time import Clock, Killed, Machine, Process, Seconds

import pipeline.dump.partitions as partitions
from pipeline.config import CorpusConfig, DumpConfig
from pipeline.corpus import Sequence
from pipeline.dump.partitions import Meter, Overtaken, PartitionsWriter
from pipeline.progress import Progress
from storage import Dump, StoreError, TopK, create_dump
from storage.dump_tables import tables_file
from storage.gc import DEFAULT_HOURS, leftovers, remove
from storage.index_files import dump_index, partition_index, shard_index

HOUR = 3600.0
LENGTH = 5  # tokens of a sequence
SHARD_TOKENS = 2 * LENGTH
VOCAB = 256
URL = "simulated://dump"


@dataclass(frozen=True)
class Month:
    """What is simulated. Times are means of random ones, in hours."""

    workers: int = 1000
    partitions: int = 2000
    days: float = 30.0
    """of work, if nothing were done twice"""
    shard: float = 48.0
    """One shard on one worker."""
    life: float = 96.0
    """A machine, until it is preempted."""
    start: float = 0.1
    """The engine."""
    notice: float = 0.1
    """Until the scheduler takes a silent machine for dead."""
    replaced: float = 0.2
    """Until there is another machine."""
    orphans: float = 0.2
    """Share of the preempted machines that are cut off from the scheduler, and live on."""
    orphan_life: float = 6.0
    frozen: float = 0.5
    """Share of the orphans that first stand still."""
    longest_frozen: float = 12.0
    outages: float = 1.0
    """of the whole store, a week"""
    outage: float = 0.2
    gc_every: float = 168.0
    seed: int = 0
    codec: str = "v3"
    faults: Faults = field(default_factory=Faults)

    @property
    def documents(self) -> int:
        return 3 * self.sequences // 4

    @property
    def sequences(self) -> int:
        """Four in three documents."""
        return 4 * round(self.workers * self.days * 24 / self.shard / 2)


@dataclass
class Report:
    """What happened; the last counts must be 0."""

    month: Month
    hours: float = 0.0
    shards: int = 0
    rows: int = 0
    attempts: int = 0
    preempted: int = 0
    in_commit: int = 0
    orphans: int = 0
    frozen: int = 0
    outages: int = 0
    failed: int = 0
    """Attempts that ended because the store did not answer."""
    second: int = 0
    """Commits that found the shard committed by another writer, and removed their own file."""
    computed: int = 0
    """Sequences, also those that were computed before."""
    collections: int = 0
    strays: int = 0
    """Files of dead writers that gc removed."""
    requests: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    torn: int = 0
    broken: int = 0
    """Instants at which a marker named a file that was not there, or was replaced."""
    left: int = 0
    """Files that nothing names, after the last gc."""

    @property
    def faults(self) -> int:
        return self.lost + self.doubled + self.torn + self.broken + self.left

    @property
    def twice(self) -> float:
        """Sequences computed in vain, as a share of those that are stored."""
        return self.computed / self.month.sequences - 1

    def __str__(self) -> str:
        month, happened = self.month, self.happened
        requests = ", ".join(f"{count:,} {kind}" for kind, count in self.requests.most_common())
        died = happened["died before"] + happened["died after"]
        return f"""
workers         {month.workers:,}, {month.partitions:,} partitions, codec {month.codec}, \
seed {month.seed}
virtual time    {self.hours / 24:.1f} days, of which {month.days:g} of undisturbed work; \
{month.shard:g} h a shard
preempted       {self.preempted:,} after {month.life:g} h on average; \
{self.in_commit:,} inside a commit, {died:,} at a request
orphans         {self.orphans:,} of them lived on and wrote, {self.frozen:,} after standing still \
for up to {month.longest_frozen:g} h
attempts        {self.attempts:,}; {self.failed:,} ended in one of {self.outages} outages
requests        {sum(self.requests.values()):,}: {requests}
of these        {happened["lost"]:,} lost, {happened["unanswered"]:,} answers lost, \
{happened["doubled"]:,} done twice, {happened["refused"]:,} refused
gc              {self.collections} times; {self.strays:,} files of dead writers removed
work in vain    {self.twice:.1%} of the sequences; {self.second:,} commits came second
result          {self.rows:,} rows in {self.shards:,} shards: lost {self.lost}, \
doubled {self.doubled}, torn {self.torn}; markers broken {self.broken}, files left {self.left}"""


# The corpus: what each document holds follows from its number.


def rows_of(document: int) -> Iterator[Sequence]:
    """One sequence, or two for every third document."""
    chunks = 1 + (document % 3 == 0)
    for chunk in range(chunks):
        ids = np.frombuffer(document.to_bytes(4, "little") + bytes([chunk]), np.uint8)
        yield Sequence(f"d{document}", document, chunk, ids.astype(np.int32), chunk + 1 == chunks)


def some_topk(positions: int) -> TopK:
    half = np.full(positions, np.log(0.5), np.float32)
    return TopK(np.ones(positions, np.uint16), np.arange(positions, dtype=np.int32), half, half)


TOPK = some_topk(LENGTH - 1)


class Uncounted(Meter):
    """No progress is shown."""

    def __init__(self) -> None:
        super().__init__(Progress.__new__(Progress), masked=False)

    def count(self, *_: Any) -> None:
        pass


class Inline:
    """In place of the pool that encodes rows: tiny ones need none."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)


class Beside:
    """In place of the pool of a PartitionsWriter: a commit is a process of the same machine."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.running = clock, list[Outcome]()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Outcome":
        machine = self.clock.current.machine
        outcome = Outcome(self.clock)
        outcome.process = self.clock.start(lambda: outcome.of(work, *arguments), machine)
        self.running = [outcome]
        return outcome

    def shutdown(self) -> None:
        for outcome in self.running:
            self.clock.join(outcome.process)


class Outcome:
    """As a Future: the result of a process, or its error."""

    process: Process

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.value: Any = None
        self.error: Exception | None = None

    def of(self, work: Callable[..., Any], *arguments: Any) -> None:
        try:
            self.value = work(*arguments)
        except Exception as error:
            self.error = error

    def done(self) -> bool:
        return self.process.ended

    def result(self) -> Any:
        self.clock.join(self.process)
        if self.error is not None:
            raise self.error
        return self.value


class Fleet:
    """The machines, and the scheduler that gives them partitions."""

    def __init__(self, month: Month) -> None:
        self.month, self.report = month, Report(month)
        self.clock, self.rng = Clock(), random.Random(month.seed)
        self.bucket = Bucket(self.clock, self.rng, month.faults)
        self.bucket.watch = Watch(self.bucket, self.report)
        self.waiting, self.done = deque(range(month.partitions)), set[int]()
        self.idle: list[Host] = []
        self.finished = False
        self.config = DumpConfig(
            "none", CorpusConfig("none"), URL, k=1, min_prob=0.0, shard_tokens=SHARD_TOKENS
        )
        self.plan = {
            "vocab_size": VOCAB,
            "k": 1,
            "step": 1 / 416,
            "codec": month.codec,
            "partitions": month.partitions,
        }

    def run(self) -> Report:
        """The month, and what is there after it."""
        month = self.month
        for _ in range(month.workers):
            self.clock.call(self.hours(month.replaced), lambda: Host(self).boot())
        self.clock.call(self.hours(168 / month.outages), self.break_down)
        self.clock.call(month.gc_every * HOUR, self.clean)
        self.clock.run()
        self.clock.now += (DEFAULT_HOURS + 1) * HOUR
        self.collect()
        self.report.requests, self.report.happened = self.bucket.requests, self.bucket.happened
        audit(self.bucket, self.report)
        return self.report

    def hours(self, mean: float) -> float:
        """Seconds until something that comes by chance."""
        return self.rng.expovariate(1 / (mean * HOUR))

    def take(self, host: "Host") -> int | None:
        """A partition for a host; None if there is none now."""
        if self.waiting:
            return self.waiting.popleft()
        self.idle.append(host)
        return None

    def give_back(self, partition: int) -> None:
        """Another machine shall do it."""
        self.waiting.append(partition)
        while self.idle:
            host = self.idle.pop()
            if host.known:
                self.clock.start(host.work, host.machine)
                return

    def complete(self, partition: int) -> None:
        self.done.add(partition)
        if len(self.done) == self.month.partitions and not self.finished:
            self.finished = True
            for _ in range(2):
                self.finish()

    def finish(self, spared: bool = False) -> None:
        """Write the manifest, as two tasks at once do; again where one dies.

        The second attempt is spared: of thousands of requests, one would be its last.
        """
        machine = Machine(lambda: self.finish(spared=True))
        machine.spared = spared

        def work() -> None:
            while True:
                with contextlib.suppress(StoreError):
                    Dump(URL).finish()
                    self.report.hours = self.report.hours or self.clock.now / HOUR
                    return

        self.clock.start(work, machine, self.hours(0.1))

    def tell(self) -> None:
        """Say each day how far they are."""
        if not self.finished:
            days, report = self.clock.now / HOUR / 24, self.report
            print(
                f"day {days:.0f}: {report.computed:,} of {self.month.sequences:,} sequences, also "
                f"those done twice; {report.preempted:,} machines preempted",
                file=sys.stderr,
                flush=True,
            )
            self.clock.call(24 * HOUR, self.tell)

    def break_down(self) -> None:
        """Nobody reaches the store for a while."""
        if not self.finished:
            self.report.outages += 1
            self.bucket.down_until = self.clock.now + self.hours(self.month.outage)
            self.clock.call(self.hours(168 / self.month.outages), self.break_down)

    def clean(self) -> None:
        """Collect the leftovers while writers write, every week; spared, as in `finish`."""
        if not self.finished:
            machine = Machine()
            machine.spared = True
            self.clock.start(self.collect, machine)
            self.clock.call(self.month.gc_every * HOUR, self.clean)

    def collect(self) -> None:
        with contextlib.suppress(StoreError):
            found = leftovers(URL)
            remove(URL, found)
            self.report.strays += len(found)
            self.report.second -= sum(file.name.endswith(".parquet") for file in found)
            self.report.collections += 1


class Host:
    """A machine with one engine, until it is preempted."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.clock, self.month = fleet, fleet.clock, fleet.month
        self.machine = Machine(self.died)
        self.known = True  # to the scheduler
        self.partition: int | None = None
        self.commits: Beside | None = None

    def boot(self) -> None:
        if not self.fleet.finished:
            self.clock.start(self.work, self.machine)
            self.clock.call(self.fleet.hours(self.month.life), self.preempt)

    def preempt(self) -> None:
        """It dies, or it is cut off and dies later."""
        rng, month, report = self.fleet.rng, self.month, self.fleet.report
        if not self.machine.alive:
            return
        if rng.random() >= month.orphans:
            self.clock.kill(self.machine)
            return
        report.orphans += 1
        self.lose()
        stands = rng.uniform(0, month.longest_frozen) * HOUR * (rng.random() < month.frozen)
        report.frozen += stands > 0
        self.machine.frozen_until = self.clock.now + stands
        life = stands + self.fleet.hours(month.orphan_life)
        self.clock.call(life, lambda: self.clock.kill(self.machine))

    def died(self) -> None:
        commits = self.commits.running if self.commits else []
        self.fleet.report.in_commit += any(not commit.done() for commit in commits)
        self.lose()

    def lose(self) -> None:
        """The scheduler hears nothing any more: another machine takes over."""
        if not self.known:
            return
        self.known = False
        fleet, month = self.fleet, self.month
        fleet.report.preempted += 1
        partition = self.partition
        if partition is not None:
            self.clock.call(month.notice * HOUR, lambda: fleet.give_back(partition))
        self.clock.call(fleet.hours(month.replaced), Host(fleet).boot)

    def work(self) -> None:
        """Do partitions while the scheduler has some, and knows this machine."""
        while self.known and (partition := self.fleet.take(self)) is not None:
            self.partition = partition
            self.fleet.report.attempts += 1
            try:
                self.clock.sleep(self.fleet.hours(self.month.start))
                self.attempt(partition)
                self.fleet.complete(partition)
            except StoreError:
                self.fleet.report.failed += 1
                if self.known:
                    self.clock.call(self.month.notice * HOUR, give_back(self.fleet, partition))
            self.partition = None

    def attempt(self, number: int) -> None:
        """What a run of stage one does for a partition, around the engine."""
        partition = create_dump(URL, self.fleet.plan).partition(number)
        again = False
        while partition.summary is None:
            span = partitions.what_is_missing(partition, self.month.documents, again)
            again = True
            writer = PartitionsWriter(self.fleet.config, [span], Uncounted())
            writer.thread = self.commits = Beside(self.clock)  # type: ignore[assignment]
            try:
                for document in range(span.next, span.stop):
                    for sequence in rows_of(document):
                        self.compute()
                        writer.write((sequence, TOPK))
                writer.finish()
            except Overtaken:
                continue
            except Killed:
                if writer.writer is not None:
                    writer.writer.abort()
                raise
            finally:
                if self.machine.alive:
                    writer.close()

    def compute(self) -> None:
        self.fleet.report.computed += 1
        share = self.fleet.rng.uniform(0.5, 1.5) * LENGTH / SHARD_TOKENS
        self.clock.sleep(share * self.month.shard * HOUR)


def give_back(fleet: Fleet, partition: int) -> Callable[[], None]:
    return lambda: fleet.give_back(partition)


class Watch:
    """Sees each change of the store. A marker stays as it is, and its file is there."""

    def __init__(self, bucket: Bucket, report: Report) -> None:
        self.bucket, self.report, self.named = bucket, report, dict[str, str]()  # both ways

    def __call__(self, name: str, data: bytes | None) -> None:
        if data is None:
            self.report.broken += name in self.named
            self.report.second += name.endswith(".parquet")
        elif name.count("/") == 2 and name.endswith(".json") and "complete" not in name:
            file = f"{name.rsplit('/', 1)[0]}/{file_of(data)}"
            there = self.named.setdefault(name, file)
            self.named[there] = name
            self.report.broken += there != file or file not in self.bucket.objects


def file_of(marker: bytes) -> str:
    """The data file that a marker names."""
    return marker.split(b'"file": "', 1)[1].split(b'"', 1)[0].decode()


def audit(bucket: Bucket, report: Report) -> None:
    """Compare each row of the finished dump with the corpus, and each file with its marker."""
    manifest = Dump(URL).manifest()
    found: Counter[tuple[str, int]] = Counter()
    named = {"dump/plan.json", "dump/manifest.json"}
    for shard in manifest.shards:
        file = f"dump/{shard.file}"
        named |= {f"dump/{shard.name}.json", file, shard_index(file)}
        named |= {f"dump/{tables_file(shard.tables)}"} if shard.tables else set()
        data = bucket.objects.get(file, (b"", 0.0))[0]
        if hashlib.sha256(data).hexdigest() != shard.marker["sha256"]:
            report.torn += shard.rows
            continue
        columns = ["doc_id", "chunk", "input_ids"]
        for row in pq.read_table(io.BytesIO(data), columns=columns).to_pylist():
            found[row["doc_id"], row["chunk"]] += 1
            number, chunk = int(row["doc_id"][1:]), row["chunk"]
            right = list(number.to_bytes(4, "little") + bytes([chunk]))
            report.torn += row["input_ids"] != right
    wanted = {
        (row.doc_id, row.chunk)
        for number in range(report.month.documents)
        for row in rows_of(number)
    }
    report.shards, report.rows = len(manifest.shards), found.total()
    report.lost = len(wanted - found.keys())
    report.doubled = report.rows - len(found)
    for number in range(report.month.partitions):
        named |= {f"dump/{number:05d}/complete.json", f"dump/{partition_index(number)}"}
    named.add(f"dump/{dump_index(manifest.fingerprint)}")
    report.left = len(bucket.objects.keys() - named)


def simulate(month: Month, progress: bool = False) -> Report:
    """Run a month. Every chance in it follows from its seed."""
    fleet = Fleet(month)
    if progress:
        fleet.tell()
    names = mock.Mock(uuid4=lambda: uuid.UUID(int=fleet.rng.getrandbits(128)))
    SimulatedFileSystem.bucket = fleet.bucket
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(tempfile, "tempdir", folder),
        mock.patch("storage.store.time", Seconds(fleet.clock)),
        mock.patch("storage.store.random", fleet.rng),
        mock.patch("storage.shard_writer.uuid", names),
        mock.patch("storage.data_file_writer.uuid", names),
        mock.patch("storage.data_file_writer.ThreadPoolExecutor", Inline),
    ):
        return fleet.run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {name: kind for name, kind in Month.__annotations__.items() if kind in (int, float)}
    for name, kind in numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(Month, name))
    parser.add_argument("--codec", default=Month.codec)
    month = Month(**vars(parser.parse_args()))
    began = time.process_time()
    report = simulate(month, progress=True)
    print(report)
    print(f"simulated in    {time.process_time() - began:.0f} s of CPU time")
    return 1 if report.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
