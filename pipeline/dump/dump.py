"""Stage one: corpus -> teacher -> TopK -> shards.

A shard is a deterministic function of the plan, the corpus and the place where it starts: rows in
corpus order, cut at the first document end after `shard_tokens`. So two writers of one shard write
the same rows, and whoever commits second goes on from where the first did. The corpus is read and
tokenized ahead of the engine, and shards are written behind it, each in a thread.
"""

import contextlib
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.config import DumpConfig
from pipeline.corpus import Corpus, Sequence
from pipeline.dump import workers
from pipeline.dump.threads import Behind, ahead
from pipeline.errors import ConfigError
from pipeline.models import directory as model_dir
from pipeline.progress import Progress, say
from pipeline.signals import stop_on_signals
from pipeline.teacher.vllm_teacher import Teacher, engine_version, make_teacher
from storage import Dump, Partition, Record, ShardWriter, TopK, create_dump

Summary = dict[str, Any]
Cursor = dict[str, int]
WAITING_TOKENS = 65_536  # of answers that wait for the writer: 34 MB at k = 64
STOP_SECONDS = 60.0  # a signal ends a dump within this time, whatever the engine is doing


def run(
    config: DumpConfig,
    partition: int | None = None,
    only: Literal["plan", "finalize"] | None = None,
) -> Summary:
    """Dump one partition, or all of them, and finish the dump when nothing is missing.

    `only="plan"` writes plan.json and stops; `only="finalize"` writes manifest.json. Returns what
    was done: rows, tokens, bytes_per_token, tokens_per_s and so on. Raises ConfigError,
    PlanMismatch, InvalidRecord, StoreError, Interrupted; what was committed before stays.
    """
    progress = Progress(unit="document")
    progress.status = "reading the corpus and the model's files"
    try:
        with stop_on_signals(limit=STOP_SECONDS):
            return run_with(progress, config, partition, only)
    finally:
        progress.close()


def run_workers(config: DumpConfig, command: list[str]) -> Summary:
    """Dump all partitions, `config.workers` at a time, each by `command` with --partition.

    Returns and raises what `run` does, and FailedError where a partition failed for good.
    """
    if config.partitions < config.workers:
        raise ConfigError(
            f"workers {config.workers}: there are only {config.partitions} partitions; set "
            f"partitions to {config.workers} or more"
        )
    parallel = ("tensor_parallel_size", "pipeline_parallel_size")
    devices = math.prod(config.engine_args.get(name, 1) for name in parallel)
    progress = Progress(unit="document")
    progress.status = "reading the corpus and the model's files"
    try:
        with stop_on_signals(limit=STOP_SECONDS + workers.STOP_SECONDS):
            run_with(progress, config, None, "plan")
            dump = Dump(config.output)
            todo = [part.index for part in dump.partitions if part.summary is None]
            began, before = time.monotonic(), tokens_of(dump)
            progress.begin(0, 0)
            pool = workers.Pool(command, todo, config.partitions, config.workers, devices)
            pool.run(progress)
            rate = (tokens_of(dump) - before) / (time.monotonic() - began)
            return finalize(dump, range(config.partitions), None, rate if todo else None)
    finally:
        progress.close()


def tokens_of(dump: Dump) -> int:
    """Tokens committed so far."""
    return sum(shard.tokens for shard in dump.shards())


def run_with(
    progress: Progress,
    config: DumpConfig,
    partition: int | None,
    only: Literal["plan", "finalize"] | None,
) -> Summary:
    folder = model_dir.resolve(config.model, config.revision)
    tokenizer = model_dir.load_tokenizer(folder)
    corpus = Corpus(config.corpus, tokenizer, config.max_length, config.add_eos)
    model_config = model_dir.load_config(folder)
    if config.dtype == "auto":  # engines have other ideas of it: vLLM halves float32
        own = model_dir.own_dtype(model_config)
        config = replace(config, dtype=own)
    plan = make_plan(config, corpus, model_config, folder)
    if partition is not None and not 0 <= partition < config.partitions:
        raise ConfigError(f"partition {partition}: there are {config.partitions}, numbered from 0")
    dump = create_dump(config.output, plan, model_dir.tokenizer_files(folder))
    if only == "plan":
        say(f"{config.output}: plan for {len(corpus)} documents, {config.partitions} partitions")
        return {"partitions": config.partitions, "documents": len(corpus)}
    wanted = range(config.partitions) if partition is None else [partition]
    todo = [dump.partition(i) for i in wanted if dump.partition(i).summary is None]
    tokens_per_s = None
    if only is None and todo:
        architectures = list(model_config.architectures or [])
        progress.status = f"starting {config.engine}"
        meter = Meter(progress)
        with make_teacher(config, folder, architectures) as teacher:
            while todo:
                todo = write_partitions(config, todo, corpus, teacher, meter)
        tokens_per_s = meter.rate
    elif only is None:
        say(f"{config.output}: nothing left to do")
    return finalize(dump, wanted, only, tokens_per_s)


def make_plan(config: DumpConfig, corpus: Corpus, model_config: Any, folder: Any) -> dict[str, Any]:
    """Everything that decides what the dump holds; two dumps of one plan hold the same rows."""
    vocab_size = model_dir.vocab_size(model_config)
    if config.k > vocab_size:
        raise ConfigError(f"k {config.k}: the model's vocabulary has only {vocab_size} ids")
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest and config.max_length > longest:
        raise ConfigError(
            f"max_length {config.max_length}: the model reads at most {longest} tokens; set "
            f"max_length to {longest} or less"
        )
    if len(corpus.tokenizer) > vocab_size:
        raise ConfigError(
            f"model {config.model}: its tokenizer has {len(corpus.tokenizer)} tokens, its head "
            f"only {vocab_size}; they do not belong together"
        )
    tokenizer = corpus.tokenizer
    return {
        "teacher": {
            "name": config.model,
            "revision": config.revision,
            "architectures": list(model_config.architectures or []),
            "fingerprint": model_dir.weights_fingerprint(folder),
            "dtype": config.dtype,
        },
        "tokenizer": {"fingerprint": model_dir.tokenizer_fingerprint(tokenizer)},
        "vocab_size": vocab_size,
        "k": config.k,
        "step": config.step,
        # What was not there in earlier releases is in the plan only where it changes something.
        **({} if config.codec == "v1" else {"codec": config.codec}),
        **({"min_prob": config.min_prob} if config.min_prob > 0 else {}),
        **({"top_p": config.top_p} if config.top_p < 1 else {}),
        **(
            {"samples": config.samples, "sample_seed": config.sample_seed} if config.samples else {}
        ),
        "temperature": 1.0,
        "max_length": config.max_length,
        "add_eos": config.add_eos,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "corpus": {
            "path": config.corpus.path,
            "column": corpus.column,
            "documents": len(corpus),
            "fingerprint": corpus.fingerprint(),
        },
        "partitions": config.partitions,
        "shard_tokens": config.shard_tokens,
        "engine": engine_version(config),
    }


def write_partitions(
    config: DumpConfig,
    todo: list[Partition],
    corpus: Corpus,
    teacher: Teacher,
    meter: "Meter",
) -> list[Partition]:
    """Write what is missing of these partitions; the engine never waits between two of them.

    Returns those that are still not complete, because another writer cut a shard elsewhere.
    """
    spans = [what_is_missing(partition, len(corpus)) for partition in todo]
    done = sum(span.next - span.first for span in spans)
    if done:
        say(f"{config.output}: going on after {done} documents that are committed")
    meter.begin(sum(span.stop - span.first for span in spans), done)
    sequences = (sequence for span in spans for sequence in corpus.sequences(span.next, span.stop))
    writer = PartitionsWriter(config, spans, meter)
    behind = Behind(writer.write, limit=WAITING_TOKENS)
    try:
        with (
            ahead(sequences, config.in_flight) as source,
            behind,
            contextlib.closing(teacher.topk(source)) as answers,
        ):
            for sequence, topk in answers:
                behind.put((sequence, topk), len(sequence.input_ids))
        writer.finish()
    except Overtaken:
        return [partition for partition in todo if partition.summary is None]
    finally:
        if not behind.running:
            writer.close()
    return []


@dataclass(frozen=True)
class Span:
    """Documents of a partition, first to stop; `next` begins shard number `shard`.

    The two are read together: another writer may commit at any moment, and a shard number that is
    newer than the document doubles its rows.
    """

    partition: Partition
    first: int
    next: int
    stop: int
    shard: int


def what_is_missing(partition: Partition, documents: int) -> Span:
    number = partition.dump.plan["partitions"]
    first = documents * partition.index // number
    stop = documents * (partition.index + 1) // number
    shards = partition.shards
    following = int(shards[-1].marker["cursor"]["document"]) if shards else first
    return Span(partition, first, following, stop, len(shards))


class Overtaken(Exception):
    """Another writer committed this shard, and cut it at another document."""


class PartitionsWriter:
    """Writes answers, in corpus order, as the shards of one partition after the other.

    A shard is committed in a thread while the next one fills, and that one waits for it: shards
    appear in order, and at most two of them are in memory.
    """

    def __init__(
        self,
        config: DumpConfig,
        spans: list[Span],
        meter: "Meter",
    ) -> None:
        self.config, self.todo, self.meter = config, list(spans), meter
        self.index = spans[0].shard  # of the next shard
        self.writer: ShardWriter | None = None
        self.documents = 0
        self.last: Sequence | None = None
        self.thread = ThreadPoolExecutor(1, "committing")
        self.commits: list[tuple[Cursor, Future[dict[str, Any]]]] = []  # none or one

    def write(self, answer: tuple[Sequence, TopK]) -> None:
        """Add the next row. Raises InvalidRecord, StoreError, Overtaken."""
        sequence, topk = answer
        if self.commits and self.commits[0][1].done():
            self.settle()
        while sequence.document >= self.todo[0].stop:
            self.finish_partition()
        if self.writer is None:
            self.writer = ShardWriter(self.todo[0].partition, self.index)
        if self.config.min_prob > 0 or self.config.top_p < 1:
            topk = topk.cut(self.config.min_prob, self.config.top_p)
        self.writer.write(Record(sequence.doc_id, sequence.chunk, sequence.input_ids, topk))
        self.documents += sequence.ends_document
        self.last = sequence
        self.meter.count(sequence, self.writer)
        if sequence.ends_document and self.writer.tokens >= self.config.shard_tokens:
            self.commit()

    def commit(self) -> None:
        """Begin to commit the open shard, if there is one."""
        self.settle()
        if self.writer is None or self.last is None:
            return
        cursor = {"document": self.last.document + 1}
        stats = {"documents": self.documents}
        self.commits.append((cursor, self.thread.submit(self.writer.commit, cursor, stats)))
        self.writer, self.index, self.documents = None, self.index + 1, 0

    def settle(self) -> None:
        """Wait for the commit that was begun. Raises what it raised, or Overtaken."""
        while self.commits:
            cursor, commit = self.commits.pop()
            marker = commit.result()
            self.meter.bytes_per_token = marker["bytes"] / marker["tokens"]
            if marker["cursor"] != cursor:
                raise Overtaken

    def finish_partition(self) -> None:
        self.commit()
        self.settle()
        span = self.todo.pop(0)
        kept = sum(shard.marker["documents"] for shard in span.partition.shards)
        span.partition.finish({"documents": kept, "skipped": span.stop - span.first - kept})
        self.index = self.todo[0].shard if self.todo else 0

    def finish(self) -> None:
        """Nothing more will come: commit what is open and complete the partitions."""
        while self.todo:
            self.finish_partition()

    def close(self) -> None:
        """Drop the open shard; what is committed, or about to be, stays."""
        self.thread.shutdown()
        if self.writer is not None:
            self.writer.abort()
            self.writer = None


def finalize(dump: Dump, wanted: Any, only: str | None, tokens_per_s: float | None) -> Summary:
    """Write the manifest when every partition is there; the totals of what this run was asked."""
    complete = all(partition.summary is not None for partition in dump.partitions)
    if complete or only == "finalize":
        if complete and not any(partition.shards for partition in dump.partitions):
            raise ConfigError(
                f"corpus {dump.plan['corpus']['path']}: no document has two tokens, so there is "
                "nothing to store"
            )
        dump.finish()
    parts = [dump.partition(index) for index in wanted]
    markers = [shard.marker for part in parts for shard in part.shards]
    tokens = sum(marker["tokens"] for marker in markers)
    positions = sum(marker["positions"] for marker in markers)
    skipped = sum((part.summary or {}).get("skipped", 0) for part in parts)
    summary = {
        "rows": sum(marker["rows"] for marker in markers),
        "tokens": tokens,
        "documents": sum(marker["documents"] for marker in markers),
        "skipped": skipped,
        "shards": len(markers),
        "bytes": sum(marker["bytes"] for marker in markers),
        "bytes_per_token": sum(marker["bytes"] for marker in markers) / tokens if tokens else None,
        "kept_mass": sum(marker["mass"] for marker in markers) / positions if positions else None,
        "codec_kl": sum(marker["kl_sum"] for marker in markers) / positions if positions else None,
        "tokens_per_s": tokens_per_s,
        "finished": complete,
    }
    k = dump.plan["k"]
    say(
        f"{dump.store.path}: {summary['rows']:,} rows, {tokens:,} tokens in {len(markers)} shards"
        + (f", {summary['bytes_per_token']:.1f} bytes per token" if tokens else "")
        + (f", top-{k} hold {summary['kept_mass']:.3f}" if positions and k else "")
        + (f", {tokens_per_s:,.0f} tokens/s" if tokens_per_s else "")
        + (
            f", {summary['skipped']} documents skipped (under two tokens)"
            * bool(summary["skipped"])
        )
        + ("" if complete else "; other partitions are still missing")
    )
    return summary


class Meter:
    """What the progress line shows."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tokens = self.documents = 0
        self.bytes_per_token: float | None = None  # of the last shard
        self.started: float | None = None

    def begin(self, documents: int, done: int) -> None:
        """The engine is up: so many documents are there, so many of them done."""
        self.progress.begin(documents, done)
        self.documents = done
        self.started = self.started or time.monotonic()

    @property
    def rate(self) -> float:
        """Tokens per second since the engine was up."""
        return self.tokens / max(time.monotonic() - (self.started or 0.0), 1e-9)

    def count(self, sequence: Sequence, writer: ShardWriter) -> None:
        self.tokens += len(sequence.input_ids)
        self.documents += sequence.ends_document
        self.progress.update(self.documents, lambda: self.status(writer))

    def status(self, writer: ShardWriter) -> str:
        per_token = writer.bytes_per_token or self.bytes_per_token
        mass = writer.mass / max(writer.positions, 1)
        size = f", {per_token:.0f} bytes/token" if per_token else ""
        held = f", mass held {mass:.3f}" if writer.entries else ""
        return f"{self.tokens:,} tokens, {self.rate:,.0f} tokens/s{size}{held}"
