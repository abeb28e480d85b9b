"""Stage one: corpus -> teacher -> TopK -> shards.

A shard depends only on the plan, the corpus and its first document: it holds rows in corpus order
and ends at the first document end after `shard_tokens` (of tokens, or of targets where rows have
masks). So two writers of one shard write the same rows, and the writer that commits second resumes
after the first one's shard. One thread reads and tokenizes the corpus ahead of the engine; another
one writes shards behind it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pipeline.config import DumpConfig
from pipeline.dump import workers
from pipeline.dump.partitions import Meter, write_partitions
from pipeline.dump.plan import (
    dump_there,
    make_plan,
    open_corpus,
    plan_differences,
    plan_there,
    settled,
)
from pipeline.dump.reading import open_own, write_list
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.models.trainable import check_trainable
from pipeline.places import check_output, inputs_of
from pipeline.progress import Progress, say
from pipeline.signals import stop_on_signals
from pipeline.teacher.choose import make_teacher
from pipeline.types import Json
from storage import Dump, create_dump
from storage.committed import Committed, Totals
from storage.plan import masked

STOP_SECONDS = 60.0  # a signal ends a dump within this time, whatever the engine does


def run(
    config: DumpConfig,
    partition: int | None = None,
    only: Literal["plan", "finalize"] | None = None,
) -> Json:
    """Dump one partition, or all of them; finish the dump if all partitions are complete.

    `only="plan"` writes plan.json and stops; `only="finalize"` writes manifest.json. Returns the
    totals of `finalize`: rows, tokens, targets, bytes_per_token, tokens_per_s and so on. Raises
    ConfigError, PlanMismatch, InvalidRecord, IncompleteDump, StoreError, Interrupted; committed
    shards stay.
    """
    progress = Progress(unit="document")
    progress.status = "reading the corpus and the model's files"
    try:
        with stop_on_signals(limit=STOP_SECONDS):
            return run_with(progress, config, partition, only)
    finally:
        progress.close()


def run_workers(config: DumpConfig, command: list[str]) -> Json:
    """Dump all partitions, `config.workers` at a time, each by `command` with --partition.

    Returns and raises what `run` does; also raises FailedError if a partition failed for good.
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
            there = dump.now()
            todo, before = there.incomplete, tokens_of(there)
            began = time.monotonic()
            progress.begin(0, 0)
            pool = workers.Pool(command, todo, config.partitions, config.workers, devices)
            pool.run(progress)
            there = dump.now()
            rate = (tokens_of(there) - before) / (time.monotonic() - began)
            wanted = range(config.partitions)
            return finalize(dump, wanted, None, rate if todo else None, there)
    finally:
        progress.close()


def tokens_of(committed: Committed) -> int:
    """Tokens of all shards."""
    return sum(shard.tokens for shard in committed.shards())


def run_with(
    progress: Progress,
    config: DumpConfig,
    partition: int | None,
    only: Literal["plan", "finalize"] | None,
) -> Json:
    if partition is not None and not 0 <= partition < config.partitions:
        raise ConfigError(f"partition {partition}: there are {config.partitions}, numbered from 0")
    model = ModelFolder.find(config.model, config.revision)
    check_output(config.output, {**dict(inputs_of(config)), "model": str(model.path)})
    check_trainable(model)
    there = None
    if partition is None and only != "finalize":
        corpus = open_corpus(config, model)
    else:
        there = dump_there(config.output)
        corpus = open_own(config, model, partition, there)
    # Resolve "auto" here: with float32 weights, vLLM would choose half precision.
    config = replace(config, dtype=model.dtype(config.dtype))
    config = settled(config, plan_there(config.output) if there is None else there.plan)
    plan = make_plan(config, corpus, model)
    dump = create_dump(config.output, plan, model.tokenizer_files(), plan_differences)
    if only != "finalize":
        write_list(dump, corpus)
    if only == "plan":
        say(f"{config.output}: plan for {len(corpus)} documents, {config.partitions} partitions")
        return {"partitions": config.partitions, "documents": len(corpus)}
    wanted = range(config.partitions) if partition is None else [partition]
    todo = [dump.partition(index) for index in incomplete(dump, partition)]
    tokens_per_s = None
    if only is None and todo:
        progress.status = f"starting {config.engine}"
        meter = Meter(progress, masked(plan))
        with make_teacher(config, model) as teacher:
            again = False
            while todo:
                todo = write_partitions(config, todo, corpus, teacher, meter, again)
                again = True
        tokens_per_s = meter.rate
    elif only is None:
        say(f"{config.output}: nothing left to do")
    return finalize(dump, wanted, only, tokens_per_s)


def incomplete(dump: Dump, partition: int | None) -> list[int]:
    """The partitions that are not complete, of all or of this one."""
    if partition is None:
        return dump.now().incomplete
    return [partition] if dump.partition(partition).summary is None else []


def finalize(
    dump: Dump,
    wanted: Sequence[int],
    only: str | None,
    tokens_per_s: float | None,
    committed: Committed | None = None,
) -> Json:
    """Write the manifest if all partitions are complete; return the totals of the `wanted` ones.

    `committed` is what is there now, if it is known. Raises IncompleteDump for `only="finalize"` if
    a partition is incomplete.
    """
    committed = committed or dump.now()
    complete = not committed.incomplete
    if complete or only == "finalize":
        if complete and not committed.shards():
            raise ConfigError(
                f"corpus {dump.plan['corpus']['path']}: no document has two tokens or more"
                + (" and a target behind the first" if masked(dump.plan) else "")
                + ", so there is nothing to store"
            )
        dump.finish(committed)
    shards = committed.shards(wanted)
    total = Totals.of(shard.marker for shard in shards)
    named = {shard.tables for shard in shards if shard.tables}
    tables_bytes = sum(size or 0 for size in dump.tables.sizes(named).values())
    skipped = sum((summary or {}).get("skipped", 0) for summary in committed.summaries(wanted))
    summary: Json = {
        "rows": total.rows,
        "tokens": total.tokens,
        "targets": total.positions,
        "documents": total.documents,
        "skipped": skipped,
        "shards": total.shards,
        "bytes": total.bytes,
        "tables_bytes": tables_bytes,
        "bytes_per_token": total.bytes_per_token,
        "bytes_per_target": total.bytes_per_target,
        "kept_mass": total.kept_mass,
        "codec_kl": total.codec_kl,
        "tokens_per_s": tokens_per_s,
        "finished": complete,
    }
    said = describe(total, tables_bytes, dump.plan, skipped, tokens_per_s, complete)
    say(f"{dump.store.path}: {said}")
    return summary


def describe(
    total: Totals,
    tables_bytes: int,
    plan: Json,
    skipped: int,
    tokens_per_s: float | None,
    complete: bool,
) -> str:
    """One line on what was dumped."""
    k, targets = plan["k"], ""
    if masked(plan):
        targets = f", {total.positions:,} of them targets,"
    parts = [f"{total.rows:,} rows, {total.tokens:,} tokens{targets} in {total.shards} shards"]
    if total.bytes_per_token is not None:
        parts.append(f"{total.bytes_per_token:.1f} bytes per token")
        if targets:
            parts.append(f"{total.bytes_per_target:.1f} bytes per target")
    if tables_bytes:
        parts.append(f"{tables_bytes:,} bytes of tables for all shards")
    if total.kept_mass is not None and k:
        parts.append(f"top-{k} hold {total.kept_mass:.3f}")
    if tokens_per_s:
        parts.append(f"{tokens_per_s:,.0f} tokens/s")
    if skipped:
        parts.append(f"{skipped} documents skipped (under two tokens, or without a target)")
    return ", ".join(parts) + ("" if complete else "; other partitions are still missing")
