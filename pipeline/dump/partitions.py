"""Write the shards of partitions while the engine runs."""

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.config import DumpConfig
from pipeline.corpus import Corpus, Sequence
from pipeline.dump.threads import Behind, ahead
from pipeline.progress import Progress, say
from pipeline.teacher.teacher import Teacher
from storage import Partition, Record, ShardWriter, TopK
from storage.committed import Shard
from storage.parsing import whole

Cursor = dict[str, int]
WAITING_POSITIONS = 65_536  # of answers that wait for the writer: 34 MB at k = 64


def write_partitions(
    config: DumpConfig,
    todo: list[Partition],
    corpus: Corpus,
    teacher: Teacher,
    meter: "Meter",
    again: bool = False,
) -> list[Partition]:
    """Write the missing shards of these partitions; the engine does not wait between partitions.

    Returns the partitions that are still incomplete because another writer ended a shard at another
    document, or because a marker was lost. For these, call it `again`: it then reads every marker.
    """
    spans = [what_is_missing(partition, len(corpus), again) for partition in todo]
    done = sum(span.next - span.first for span in spans)
    if done:
        say(f"{config.output}: resuming after {done} committed documents")
    meter.begin(sum(span.stop - span.first for span in spans), done)
    sequences = (sequence for span in spans for sequence in corpus.sequences(span.next, span.stop))
    writer = PartitionsWriter(config, spans, meter)
    behind = Behind(writer.write, limit=WAITING_POSITIONS)
    try:
        with (
            ahead(sequences, config.in_flight) as source,
            behind,
            contextlib.closing(teacher.topk(source)) as answers,
        ):
            for sequence, topk in answers:
                behind.put((sequence, topk), len(topk))
        writer.finish()
    except Overtaken:
        return [partition for partition in todo if partition.summary is None]
    finally:
        if not behind.running:
            writer.close()
    return []


@dataclass(frozen=True)
class Span:
    """Documents `first` to `stop` of a partition; shard number `shard` starts at document `next`.

    `shard` and `next` come from one read: another writer may commit at any moment, and a shard
    number newer than `next` would duplicate rows.
    """

    partition: Partition
    first: int
    next: int
    stop: int
    shard: int


def documents_of(index: int, partitions: int, documents: int) -> tuple[int, int]:
    """The first document of a partition, and the one after its last."""
    return documents * index // partitions, documents * (index + 1) // partitions


def what_is_missing(partition: Partition, documents: int, every: bool = False) -> Span:
    """Where the next shard starts, by the last two markers; by `every` marker, if asked.

    Raises CorruptShard for a cursor outside the partition.
    """
    first, stop = documents_of(partition.index, partition.dump.plan["partitions"], documents)
    shards = partition.shards if every else partition.latest(2)
    following = end_of(shards, first, stop)
    return Span(partition, first, following, stop, shards[-1].index + 1 if shards else 0)


def end_of(shards: list[Shard], first: int, stop: int) -> int:
    """The document after these shards, whose documents are from `first` to `stop`.

    Raises CorruptShard unless the markers count documents, and their cursors are in order.
    """
    following = first
    for shard in shards:
        name = f"{shard.name}.json"
        whole(shard.marker, "documents", name)
        following = whole(shard.marker["cursor"], "document", name, following, stop)
    return following


class Overtaken(Exception):
    """The shards are not those that this writer counted on: another one committed this shard and
    ended it at another document, or a marker is gone."""


class PartitionsWriter:
    """Writes answers in corpus order into shards, one partition after the other.

    A thread commits a shard while the next one fills; the next commit waits for it. So shards
    appear in order, and at most two are in memory.
    """

    def __init__(
        self,
        config: DumpConfig,
        spans: list[Span],
        meter: "Meter",
    ) -> None:
        self.config, self.todo, self.meter = config, list(spans), meter
        self.index = spans[0].shard  # number of the next shard
        self.writer: ShardWriter | None = None
        self.documents = 0
        self.last: Sequence | None = None
        self.thread = ThreadPoolExecutor(1, "committing")
        self.commits: list[tuple[Cursor, Future[dict[str, Any]]]] = []  # at most one

    def write(self, answer: tuple[Sequence, TopK]) -> None:
        """Add the next row. Raises InvalidRecord, StoreError, Overtaken."""
        sequence, topk = answer
        if self.commits and self.commits[0][1].done():
            self.settle()
        while sequence.document >= self.todo[0].stop:
            self.finish_partition()
        if self.writer is None:
            self.writer = ShardWriter(self.todo[0].partition, self.index)
        if self.config.min_prob or self.config.top_p < 1:
            topk = topk.cut(self.config.min_prob or 0.0, self.config.top_p)
        doc_id, chunk, ids = sequence.doc_id, sequence.chunk, sequence.input_ids
        self.writer.write(Record(doc_id, chunk, ids, topk, sequence.targets))
        self.documents += sequence.ends_document
        self.last = sequence
        self.meter.count(sequence, self.writer)
        if sequence.ends_document and self.writer.learnt >= self.config.shard_tokens:
            self.commit()

    def commit(self) -> None:
        """Start to commit the open shard, if there is one."""
        self.settle()
        if self.writer is None or self.last is None:
            return
        cursor = {"document": self.last.document + 1}
        stats = {"documents": self.documents}
        self.commits.append((cursor, self.thread.submit(self.writer.commit, cursor, stats)))
        self.writer, self.index, self.documents = None, self.index + 1, 0

    def settle(self) -> None:
        """Wait for the running commit. Raises its error, or Overtaken."""
        while self.commits:
            cursor, commit = self.commits.pop()
            marker = commit.result()
            self.meter.bytes_per_token = marker["bytes"] / marker["tokens"]
            if marker["cursor"] != cursor:
                raise Overtaken

    def finish_partition(self) -> None:
        self.commit()
        self.settle()
        span = self.todo[0]
        shards = span.partition.shards
        end_of(shards, span.first, span.stop)
        if len(shards) != self.index:
            raise Overtaken
        kept = sum(shard.marker["documents"] for shard in shards)
        summary = {"documents": kept, "skipped": span.stop - span.first - kept}
        span.partition.finish(summary, shards)
        self.todo.pop(0)
        self.index = self.todo[0].shard if self.todo else 0

    def finish(self) -> None:
        """After the last row: commit the open shard and complete the partitions."""
        while self.todo:
            self.finish_partition()

    def close(self) -> None:
        """Discard the open shard; a running commit is completed."""
        self.thread.shutdown()
        if self.writer is not None:
            self.writer.abort()
            self.writer = None


class Meter:
    """Counts documents, tokens and, where rows have masks, targets for the progress line."""

    def __init__(self, progress: Progress, masked: bool) -> None:
        self.progress, self.masked = progress, masked
        self.tokens = self.targets = self.documents = 0
        self.bytes_per_token: float | None = None  # of the last shard
        self.started: float | None = None

    def begin(self, documents: int, done: int) -> None:
        """Start the clock once the engine is ready; `done` of `documents` are already written."""
        self.progress.begin(documents, done)
        self.documents = done
        self.started = self.started or time.monotonic()

    @property
    def rate(self) -> float:
        """Tokens per second since the engine was ready."""
        return self.tokens / max(time.monotonic() - (self.started or 0.0), 1e-9)

    def count(self, sequence: Sequence, writer: ShardWriter) -> None:
        self.tokens += len(sequence.input_ids)
        self.targets += len(sequence.positions)
        self.documents += sequence.ends_document
        self.progress.update(self.documents, lambda: self.status(writer))

    def status(self, writer: ShardWriter) -> str:
        per_token = writer.bytes_per_token or self.bytes_per_token
        sums = writer.sums
        mass = sums.mass / max(sums.positions, 1)
        size = f", {per_token:.0f} bytes/token" if per_token else ""
        held = f", mass held {mass:.3f}" if sums.entries else ""
        targets = f", {self.targets:,} targets" if self.masked else ""
        return f"{self.tokens:,} tokens{targets}, {self.rate:,.0f} tokens/s{size}{held}"
