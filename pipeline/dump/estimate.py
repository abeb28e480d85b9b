"""Estimate the cost of a dump: disk, engine hours, and the number of student runs that repays it.

A few documents go through the real stage one into a temporary directory; the rest is arithmetic.
"""

import math
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config import DumpConfig
from pipeline.corpus import Corpus
from pipeline.dump import dump, sizing
from pipeline.dump.plan import open_corpus, targets_of
from pipeline.models.directory import ModelFolder

COUNTED = 1000  # documents, spread over the corpus, whose tokens and targets are counted


@dataclass(frozen=True)
class Estimate:
    """The cost of one whole corpus, with a single engine."""

    documents: int
    tokens: float
    tokens_error: float
    """Standard error of `tokens`; 0 if every document was counted."""
    targets: float
    """Tokens with a distribution: all but the first of a sequence, or those of its mask."""
    masked: bool
    """Whether rows have masks."""
    sample_tokens: int
    bytes_per_token: float
    bytes_per_target: float
    tables_bytes: int
    """of the tables that all shards share, see storage/dump_tables.py"""
    kept_mass: float
    """Mean probability of the stored top-k."""
    tokens_per_s: float
    start_s: float
    """Seconds until the engine is ready."""
    parameters: int
    """Number of the model's parameters."""
    flops_per_token: float
    """FLOP of the forward pass: 2 for each weight that a token is multiplied with, on average. The
    head's weights are multiplied with the targets alone."""
    weight_bytes: int
    """Bytes of a live teacher's weights beside the student."""

    @property
    def disk(self) -> float:
        """Bytes. Most of them are distributions, so they follow the targets."""
        return self.targets * self.bytes_per_target + self.tables_bytes

    @property
    def seconds(self) -> float:
        return self.tokens / self.tokens_per_s

    def break_even(self, run_tokens: float) -> float:
        """Number of student runs after which a live teacher has cost as much as the dump.

        The dump reads the corpus once; a live teacher reads `run_tokens` general tokens in each
        run. Its forward pass is the same, and it is assumed to run at the engine's speed, which was
        measured with top-k and writing.
        """
        return self.tokens / run_tokens


def run(config: DumpConfig, documents: int, run_tokens: int | None = None) -> dict[str, Any]:
    """Dump `documents` documents, print the estimate and return it. Raises what `dump.run` does."""
    found = measure(config, documents)
    print(describe(found, config, run_tokens))
    return asdict(found) | {"disk": found.disk, "seconds": found.seconds}


def measure(config: DumpConfig, documents: int) -> Estimate:
    model = ModelFolder.find(config.model, config.revision)
    corpus = open_corpus(config, model)
    tokens, error, targets = count(corpus)
    start = first_to_store(corpus, documents)
    limit = min(documents, len(corpus) - start)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as sample:
        done = dump.run(
            replace(
                config,
                corpus=replace(config.corpus, skip=config.corpus.skip + start, limit=limit),
                output=str(Path(sample) / "dump"),
                partitions=1,
                workers=1,
            )
        )
    rate = float(done["tokens_per_s"])
    has = weights(model)
    dtype: torch.dtype = getattr(torch, model.dtype(config.dtype))
    return Estimate(
        documents=len(corpus),
        tokens=tokens,
        tokens_error=error,
        targets=targets,
        masked=bool(targets_of(corpus)),
        sample_tokens=int(done["tokens"]),
        bytes_per_token=float(done["bytes_per_token"]),
        bytes_per_target=float(done["bytes_per_target"]),
        tables_bytes=int(done["tables_bytes"]),
        kept_mass=float(done["kept_mass"]),
        tokens_per_s=rate,
        start_s=max(time.monotonic() - began - done["tokens"] / rate, 0.0),
        parameters=has.total,
        flops_per_token=2.0 * (has.body + has.head * targets / max(tokens, 1)),
        weight_bytes=has.total * torch.finfo(dtype).bits // 8,
    )


def counted(corpus: Corpus) -> list[int]:
    """The numbers of COUNTED documents, which are spread over the corpus."""
    number = min(COUNTED, len(corpus))
    return (np.arange(number) * len(corpus) // number).tolist()


def first_to_store(corpus: Corpus, documents: int) -> int:
    """Where the documents that are measured begin: 0, or where the first so many have nothing to
    store, at the first of the counted ones that has."""

    def has(begin: int, end: int) -> bool:
        return any(True for _ in corpus.sequences(begin, min(end, len(corpus))))

    if has(0, documents):
        return 0
    return next((at for at in counted(corpus) if has(at, at + 1)), 0)


def count(corpus: Corpus) -> tuple[float, float, float]:
    """(tokens of the whole corpus, their standard error, targets), from COUNTED documents."""
    chosen = counted(corpus)
    number = len(chosen)
    found = np.zeros((number, 2))
    for row, at in enumerate(chosen):
        for sequence in corpus.sequences(at, at + 1):
            found[row] += len(sequence.input_ids), len(sequence.positions)
    tokens, targets = (found.mean(0) * len(corpus)).tolist()
    if number == len(corpus):
        return tokens, 0.0, targets
    error = found[:, 0].std(ddof=1) / math.sqrt(number) * len(corpus)
    return tokens, float(error), targets


class Weights(NamedTuple):
    """Numbers of a model's weights."""

    total: int
    body: int
    """that each token is multiplied with, without the head"""
    head: int


def weights(folder: ModelFolder) -> Weights:
    """From the model's shape.

    The input embedding is a lookup, so it is part of neither, unless the head is tied to it. For a
    mixture of experts the body is too large: it includes all experts.
    """
    model = folder.empty()
    total = sum(weight.numel() for weight in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    own = 0 if head is embedding else head.numel()
    return Weights(total, total - embedding.numel() - own, head.numel())


def describe(of: Estimate, config: DumpConfig, run_tokens: int | None) -> str:
    per_run = run_tokens or of.tokens
    reads = "one pass over this corpus" if run_tokens is None else f"{run_tokens:,} general tokens"
    error = f" ± {of.tokens_error / of.tokens:.1%}" if of.tokens_error else ""
    runs = of.break_even(per_run)
    speed = of.flops_per_token * of.tokens_per_s
    targets = f", {of.targets:,.0f} of them targets" if of.masked else ""
    per_target = f", {of.bytes_per_target:.1f} per target" if of.masked else ""
    tables = f", {size(of.tables_bytes)} of tables once" if of.tables_bytes else ""
    return f"""
corpus       {of.documents:,} documents, {of.tokens:,.0f} tokens{error}{targets}
measured on  {of.sample_tokens:,} tokens through {config.engine}
disk         {size(of.disk)}: {of.bytes_per_token:.1f} bytes per token{per_target} (fewer in larger
             shards){tables}
{kept(of.kept_mass, config)}
engine       {hours(of.seconds)}: {of.tokens_per_s:,.0f} tokens/s on one engine; N engines need
             1/N of it. Add {hours(of.start_s)} per start. A small sample does not fill a GPU.
compute      {si(of.parameters)} parameters, {si(of.flops_per_token)}FLOP per token, \
{si(speed)}FLOP/s reached

a live teacher instead
memory       {size(of.weight_bytes)} for its weights beside each student
each run     {hours(per_run / of.tokens_per_s)} more, for {reads}, at this engine's speed
break-even   after {runs:.3g} run{"" if runs == 1 else "s"}; every later run saves this time

on several machines, of workers: {config.workers} each (deploy/SIZING.md explains the columns)
{sizing.on_machines(of.tokens, config.workers, engine_of(of, config))}"""


def engine_of(of: Estimate, config: DumpConfig) -> sizing.Engine:
    """What was measured of the engine. Where rows have masks, targets fill a shard."""
    return sizing.Engine(
        of.tokens_per_s,
        of.disk / of.tokens,
        of.start_s,
        round(config.shard_tokens * (of.tokens / of.targets if of.masked else 1)),
        config.codec in (None, "v3"),
    )


def kept(mass: float, config: DumpConfig) -> str:
    """How much of the teacher's probability the dump keeps, and how to keep more."""
    line = "kept        "
    if config.k:
        line += f" the top {config.k} hold {mass:.1%} of the probability"
    if config.samples:
        return f"{line}{',' * (config.k > 0)} {config.samples} samples stand for the rest"
    return f"""{line}; the rest is kept as one sum.
             If the rest is large and little may be lost, `k: 8` with `samples: 8` teaches it too,
             in fewer bytes. A larger loss.alpha in training comes first: it costs no bytes"""


def size(count: float) -> str:
    return si(count) + "B"


def si(count: float) -> str:
    """Three digits and a prefix: 1.23 G."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {prefix}"
        count /= 1000
    return f"{count:.3g} P"


def hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
