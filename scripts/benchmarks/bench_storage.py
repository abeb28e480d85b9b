"""Bytes per token, distortion and speed of the stored format, on one core.

    python scripts/benchmarks/bench_storage.py runs/demo/dump sample.npz --plot storage.png

Takes dumps (finished or not), or .npz files with input_ids [N, T], ids and logprobs [N, T, K] and
vocab_size. Writes each as real shards and reads them back. Bytes are those of whole shards, with
input_ids and tables; those of version 3 serve all shards of a dump, here they count for one.
`--tokens` limits each input, `--sweep` the sweeps over steps, k and cut-offs. KL is the cost of the
grid in nats, on the kept ids and the tail. The numbers of a dump are on a grid already, so each is
first moved by up to half a step at random. `python -m storage inspect` shows the KL that the
teacher's own numbers had.

Speeds are tokens per second of the process's CPU time, the best of three runs, so that other
processes disturb them less. Sampled targets (arXiv 2503.16870) have noise instead of an error
(bench_cutoff.py measures it). For a dump with samples, only the samples are measured, beside the
size of as many ids at 17 + 7 bits each. For a dump without, that size is estimated for 50 draws.
"""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"  # one core, whatever the machine has

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dump.plan import COARSE, MIN_PROB
from storage import LogitDataset, Ranks, Record, ShardWriter, Successors, TopK, create_dump, decode
from storage.codec import samples as sampled
from storage.codec import v3_learning
from storage.codec.codec import STEPS, pack, quantised
from storage.shard_reader import ShardReader
from storage.topk import codec_kl

SPEED_TOKENS = 60_000
SWEEPS = {"v1": (2, 4, 8, 16, 32), "v2": (2, 4, 8, 16, 32), "v3": (125, 250, 416, 832)}
"""Steps of each codec's grid, as parts of 1."""


@dataclass
class Line:
    """One layout's row of the table."""

    group: str
    name: str
    size: float  # bytes per token
    kl: float = float("nan")
    mass: float = float("nan")
    encode: float = float("nan")
    decode: float = float("nan")
    opened: float = float("nan")  # milliseconds of CPU to open the shard, its tables included

    def __str__(self) -> str:
        numbers = [f"{self.size:10.1f}", f"{self.kl:10.1e}", f"{self.mass:8.4f}"]
        numbers += [f"{speed:12,.0f}" for speed in (self.encode, self.decode)]
        numbers += [f"{self.opened:10.1f}"]
        return f"{self.name:<34}" + "".join(numbers).replace("nan", "  –")


def load(path: Path, limit: int) -> tuple[list[Record], int]:
    """(rows of about `limit` tokens, vocabulary size)."""
    rows: list[Record] = []
    tokens = 0
    if path.suffix != ".npz":
        dataset = LogitDataset(path, partial=True)
        rng, step = np.random.default_rng(0), float(dataset.plan["step"])
        if dataset.plan.get("codec") == "v3":
            raise SystemExit(f"{path}: give a dump of version 1 or 2, on a grid of logarithms")
        for record in dataset:
            topk = off_the_grid(record.topk, step, rng)
            rows.append(Record(record.doc_id, record.chunk, record.input_ids, topk))
            tokens += len(record.input_ids)
            if tokens >= limit:
                break
        return rows, int(dataset.plan["vocab_size"])
    data = np.load(path)
    for number, input_ids in enumerate(data["input_ids"]):
        logprobs = np.minimum(data["logprobs"][number, :-1].astype(np.float64), 0)
        # The file has no tail: the tail gets the missing mass.
        tail = np.log(np.maximum(1 - np.exp(logprobs).sum(1), 1e-9))
        topk = TopK.from_dense(data["ids"][number, :-1], logprobs, tail)
        rows.append(Record(str(number), 0, input_ids, topk))
        tokens += len(input_ids)
        if tokens >= limit:
            break
    return rows, int(data["vocab_size"])


def off_the_grid(topk: TopK, step: float, rng: np.random.Generator) -> TopK:
    """Move each stored number at random within its step, as a teacher's number would lie."""
    noisy = topk.logprobs + rng.uniform(-step / 2, step / 2, len(topk.ids))
    order = np.lexsort((-noisy, np.repeat(np.arange(len(topk)), topk.counts)))
    tail = topk.tail_logprob + rng.uniform(-step / 2, step / 2, len(topk))
    mass = TopK(topk.counts, topk.ids, noisy, tail).kept_mass()
    with np.errstate(divide="ignore"):  # positions without entries
        total = np.logaddexp(np.log(mass), tail)
    noisy = np.minimum(noisy[order] - np.repeat(total, topk.counts), 0).astype(np.float32)
    tail = (tail - total).astype(np.float32)
    return TopK(topk.counts, topk.ids[order], noisy, tail, topk.samples)


def first(rows: list[Record], tokens: int) -> list[Record]:
    ends = np.cumsum([len(row.input_ids) for row in rows])
    return rows[: int(np.searchsorted(ends, tokens)) + 1]


def changed(rows: list[Record], change: Callable[[TopK], TopK]) -> list[Record]:
    return [Record(row.doc_id, row.chunk, row.input_ids, change(row.topk)) for row in rows]


def best_of(topk: TopK, k: int) -> TopK:
    ids, logprobs = topk.dense()
    if k >= ids.shape[1]:
        return topk
    rest = np.logaddexp.reduce(logprobs[:, k:].astype(np.float64), axis=1)
    return TopK.from_dense(ids[:, :k], logprobs[:, :k], np.logaddexp(topk.tail_logprob, rest))


def speed(work: Callable[[], Any], tokens: int) -> float:
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return tokens / min(times)


def total_tokens(rows: list[Record]) -> int:
    return sum(len(row.input_ids) for row in rows)


def shard(group: str, name: str, rows: list[Record], vocab: int, codec: str, step: float) -> Line:
    """Write the rows as one real shard."""
    with tempfile.TemporaryDirectory() as folder:
        samples = rows[0].topk.samples
        plan = {"vocab_size": vocab, "step": step, "partitions": 1, "codec": codec}
        plan["samples"] = samples.draws if samples else 0
        writer = ShardWriter(create_dump(folder, plan).partition(0))
        for row in rows:
            writer.write(row)
        marker = writer.commit(cursor={})
        (committed,) = writer.partition.shards
        dump = writer.partition.dump

        def opening() -> None:
            ShardReader(dump, committed).ranks(rows[0].input_ids)

        opened = 1000 / speed(opening, 1)
        tables = sum(file.stat().st_size for file in Path(folder).glob("tables-*"))
    kl, mass = marker["kl_sum"] / marker["positions"], marker["mass"] / marker["positions"]
    size = (marker["bytes"] + tables) / marker["tokens"]
    return Line(group, name, size, kl, mass, opened=opened)


def speeds(line: Line, rows: list[Record], vocab: int, codec: str, step: float) -> None:
    """Add the speeds of encoding and decoding in memory, without learning the tables."""
    rows = first(rows, SPEED_TOKENS)
    grids: list[Any] = [
        (row.input_ids, quantised(row.topk, vocab, step, codec).narrow()) for row in rows
    ]
    if codec == "v1":
        ranks = Ranks.learn((grid for _, grid in grids), vocab)
        work = [(grid, ranks) for _, grid in grids]
    else:
        tables = (Successors.learn if codec == "v2" else v3_learning.learn)(grids, vocab)
        work = [(grid, tables.row(input_ids)) for input_ids, grid in grids]
    payloads = [(pack(grid, known), known) for grid, known in work]
    line.encode = speed(lambda: [pack(*one) for one in work], total_tokens(rows))
    line.decode = speed(lambda: [decode(*one) for one in payloads], total_tokens(rows))


def lists(rows: list[Record]) -> Line:
    """The plain layout: int32 and float16 lists in Parquet with zstd."""
    columns = {
        "ids": pa.array([row.topk.ids for row in rows], pa.list_(pa.int32())),
        "logprobs": pa.array(
            [row.topk.logprobs.astype(np.float16) for row in rows], pa.list_(pa.float16())
        ),
        "tail": pa.array(
            [row.topk.tail_logprob.astype(np.float16) for row in rows], pa.list_(pa.float16())
        ),
        "input_ids": pa.array([row.input_ids for row in rows], pa.list_(pa.int32())),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lists.parquet"

        def write() -> None:
            pq.write_table(pa.table(columns), file, compression="zstd", row_group_size=32)

        def read() -> None:
            with pq.ParquetFile(file) as opened:
                for group in range(opened.num_row_groups):
                    table = opened.read_row_group(group, use_threads=False)
                    for column in ("ids", "logprobs", "tail"):
                        for value in table.column(column):
                            value.values.to_numpy(zero_copy_only=False).astype(np.float32)

        tokens = total_tokens(rows)
        encoded, decoded = speed(write, tokens), speed(read, tokens)
        size = file.stat().st_size / tokens
    line = Line("plain", "Parquet lists int32 + fp16, zstd", size, encode=encoded, decode=decoded)
    kls = []
    for row in rows:
        topk = row.topk
        halves = (topk.logprobs.astype(np.float16), topk.tail_logprob.astype(np.float16))
        kls.append(
            codec_kl(topk, TopK(topk.counts, topk.ids, *(h.astype(np.float32) for h in halves)))
        )
    line.kl = float(np.abs(np.concatenate(kls)).mean())
    line.mass = float(np.concatenate([row.topk.kept_mass() for row in rows]).mean())
    return line


def packed_bits(rows: list[Record], vocab: int) -> list[Line]:
    """Sizes of layouts that pack bits without compression."""
    entries = sum(len(row.topk.ids) for row in rows) / total_tokens(rows)
    width = max(17, (vocab - 1).bit_length())
    mass = float(np.concatenate([row.topk.kept_mass() for row in rows]).mean())
    found = [
        Line("plain", f"{bits}-bit ids + fp16", entries * (bits + 16) / 8, mass=mass)
        for bits in (width, width + 1)
    ]
    rng, unique = np.random.default_rng(0), []
    for row in first(rows, 20_000):
        p = np.exp(np.c_[row.topk.dense()[1], row.topk.tail_logprob].astype(np.float64))
        p /= p.sum(1, keepdims=True)
        drawn = rng.multinomial(50, p)
        # Assumes that all ids drawn from the tail are different.
        unique.append((drawn[:, :-1] > 0).sum(1) + drawn[:, -1])
    mean = float(np.concatenate(unique).mean())
    name = f"50 samples ({mean:.0f} ids): {width} + 7 bits"
    found.append(Line("sampled", name, mean * (width + 7) / 8))
    return found


def measure_samples(rows: list[Record], vocab: int) -> list[Line]:
    """Whole shards with and without samples, the samples alone, and their speeds."""
    k = int(rows[0].topk.counts[0])
    bare = changed(rows, lambda topk: replace(topk, samples=None))
    every = [row.topk.samples for row in rows if row.topk.samples is not None]
    tokens, draws = total_tokens(rows), every[0].draws
    mean, width = sum(len(one.ids) for one in every) / tokens, max(17, (vocab - 1).bit_length())
    payloads = [sampled.pack(one, vocab) for one in every]
    alone = Line(
        "samples", f"{draws} samples ({mean:.1f} ids) alone", sum(map(len, payloads)) / tokens
    )
    alone.encode = speed(lambda: [sampled.pack(one, vocab) for one in every], tokens)
    alone.decode = speed(lambda: [sampled.unpack(one) for one in payloads], tokens)
    rival = f"the same: {width} + 7 bits each"
    found = [alone, Line("samples", rival, mean * (width + 7) / 8)]
    for codec, step in STEPS.items():
        for name, these in ((f"{draws} samples", rows), ("no samples", bare)):
            found.append(shard(codec, f"{codec}, k {k}, {name}", these, vocab, codec, step))
    return found


def measure(rows: list[Record], vocab: int, sweep: int) -> list[Line]:
    small = first(rows, sweep)
    found = [lists(small), *packed_bits(small, vocab)]
    for codec, step in STEPS.items():
        line = shard(codec, f"{codec}, step 1/{1 / step:g}", rows, vocab, codec, step)
        speeds(line, rows, vocab, codec, step)
        found.append(line)
    found.append(by_default(rows, vocab))
    for codec, step in STEPS.items() if sweep else ():
        for parts in SWEEPS[codec]:
            name = f"  {codec}, step 1/{parts}"
            found.append(shard(f"{codec} steps", name, small, vocab, codec, 1 / parts))
        for k in (8, 16, 32):
            cut = changed(small, lambda topk, k=k: best_of(topk, k))  # type: ignore[misc]
            found.append(shard(f"{codec} k", f"  {codec}, k {k}", cut, vocab, codec, step))
        for min_prob in (1e-4, 3e-4, 1e-3, 3e-3):
            cut = changed(small, lambda topk, p=min_prob: topk.cut(p))  # type: ignore[misc]
            name = f"  {codec}, min_prob {min_prob:g}"
            found.append(shard(f"{codec} min_prob", name, cut, vocab, codec, step))
        for top_p in (0.99, 0.95, 0.9):
            cut = changed(small, lambda topk, p=top_p: topk.cut(top_p=p))  # type: ignore[misc]
            name = f"  {codec}, top_p {top_p:g}"
            found.append(shard(f"{codec} top_p", name, cut, vocab, codec, step))
    return found


def by_default(rows: list[Record], vocab: int) -> Line:
    """What stage one writes where nothing is asked for."""
    cut = changed(rows, lambda topk: topk.cut(MIN_PROB))
    line = shard(
        "v3", f"v3, min_prob {MIN_PROB:g}, step 1/{1 / COARSE:g}", cut, vocab, "v3", COARSE
    )
    speeds(line, cut, vocab, "v3", COARSE)
    return line


def learning(rows: list[Record], vocab: int, sizes: list[int]) -> None:
    """Bytes per token of the last rows in version 3, by tables of the first ones."""
    step = STEPS["v3"]
    grids: list[Any] = [(r.input_ids, quantised(r.topk, vocab, step, "v3")) for r in rows]
    others = grids[max(sizes) :][-60:]
    tokens = sum(len(input_ids) for input_ids, _ in others)
    for size in sizes:
        began = time.process_time()
        tables = v3_learning.learn(grids[:size], vocab)
        spent = time.process_time() - began
        coded = sum(len(pack(grid, tables.row(input_ids))) for input_ids, grid in others)
        expected = tables.cost / 8 * sum(len(grid.ids) for _, grid in others) / tokens
        print(
            f"tables of {tables.learnt:,} positions: {coded / tokens:.1f} bytes/token of "
            f"{tokens:,} others ({expected:.1f} expected), {len(tables.pack()):,} bytes, "
            f"{tables.nbytes / 2**20:.1f} MiB in memory, {spent:.1f} s to learn",
            flush=True,
        )


def plot(found: dict[str, list[Line]], target: Path) -> None:
    """Bytes per token against the cost of the grid, and against the kept mass."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 2, figsize=(11, 4.2 * len(found)), squeeze=False)
    colours = {"v1": "tab:gray", "v2": "tab:blue", "v3": "tab:purple"}
    colours |= {"plain": "tab:red", "sampled": "tab:green"}
    markers = {"steps": "o", "k": "s", "min_prob": "^", "top_p": "v"}
    for (left, right), (name, lines) in zip(axes, found.items(), strict=True):
        for group in dict.fromkeys(line.group for line in lines):
            codec, _, kind = group.partition(" ")
            these = [line for line in lines if line.group == group]
            style = {"color": colours[codec], "marker": markers.get(kind, "*"), "label": group}
            if kind == "steps":
                left.plot([line.size for line in these], [line.kl for line in these], **style)
            elif kind:
                lost = [1 - line.mass for line in these]
                right.plot([line.size for line in these], lost, **style)
            elif codec != "sampled":
                kept = [line for line in these if line.kl == line.kl]
                left.plot(
                    [line.size for line in kept], [line.kl for line in kept], ls="", ms=9, **style
                )
                if group == "plain":  # the codecs' own lines are of all rows, the sweeps of fewer
                    lost = [1 - line.mass for line in these]
                    right.plot([line.size for line in these], lost, ls="", ms=9, **style)
            else:
                for axis in (left, right):
                    axis.axvline(these[0].size, color=colours[codec], ls=":", label=group)
        left.set(yscale="log", ylabel="KL of the grid, nats", title=name)
        right.set(ylabel="mass outside the kept ids", title="k and cut-offs, of the first tokens")
        for axis in (left, right):
            axis.set(xlabel="bytes per token", xlim=(0, None))
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="DUMP_OR_NPZ")
    parser.add_argument("--tokens", type=int, default=1_050_000, help="tokens per input")
    parser.add_argument("--sweep", type=int, default=100_000, help="tokens of the sweeps; 0: none")
    parser.add_argument(
        "--learn", type=int, nargs="+", help="only: rows that tables of version 3 are learnt from"
    )
    parser.add_argument(
        "--steps", type=float, nargs="+", help="only: version 3 at these steps, as parts of 1"
    )
    parser.add_argument("--plot", type=Path, help="write a PNG")
    given = parser.parse_args()
    pa.set_cpu_count(1)
    found = {}
    for path in given.paths:
        rows, vocab = load(path, given.tokens)
        print(f"\n{path.name}: {len(rows)} rows, {total_tokens(rows):,} tokens, {vocab:,} ids")
        if given.learn:
            learning(rows, vocab, given.learn)
            continue
        if given.steps:
            lines = [
                shard("v3", f"v3, step 1/{parts:g}", rows, vocab, "v3", 1 / parts)
                for parts in given.steps
            ]
        elif rows[0].topk.samples is None:
            lines = found[f"{path.name}, {total_tokens(rows):,} tokens"] = measure(
                rows, vocab, given.sweep
            )
        else:
            lines = measure_samples(rows, vocab)
        print(
            f"{'layout':<34}{'bytes/tok':>10}{'KL':>10}{'mass':>8}"
            f"{'encode/s':>12}{'decode/s':>12}{'open, ms':>10}"
        )
        print(*lines, sep="\n", flush=True)
    if given.plot and found:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
