"""The page of a dump: how much mass it holds, how sure the teacher is, its size on disk."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.report.html import axes, heading, lead, note, page, pairs, picture, table
from pipeline.types import Json
from storage import LogitDataset, Record
from storage.manifest import Totals
from storage.plan import masked

ROWS = 300  # read, evenly spread over the dump
Float64s = npt.NDArray[np.float64]


def report(path: str) -> str:
    """The page of a dump, finished or not, with or without top-k entries."""
    dump = LogitDataset(path, partial=not (Path(path) / "manifest.json").exists())
    number = min(ROWS, len(dump))
    records = list(dump.read(np.arange(number) * len(dump) // max(number, 1)))
    parts = [lead(in_words(dump)), pairs(totals(dump))]
    k = max((int(record.topk.counts.max(initial=0)) for record in records), default=0)
    if k:  # of the rows, not of the plan, which may name a large one
        parts += coverage(records, k)
    if records and dump.draws:
        parts += draws(records, dump.draws)
    if not records:
        parts.append(note("No shard is committed yet."))
    return page(f"Dump {path}", [*parts, heading("Plan"), pairs(dump.plan)])


def coverage(records: list[Record], k: int) -> list[str]:
    """How much mass the entries hold, how often the next token is among them, the entropy."""
    found = [look(record, k) for record in records]
    entropy = np.concatenate([of.entropy for of in found])
    ks = [2**power for power in range(k.bit_length()) if 2**power < k] + [k]
    columns = [at - 1 for at in ks]
    held = np.sum([of.mass for of in found], 0)[columns] / len(entropy)
    covered = np.sum([of.hits for of in found], 0)[columns] / len(entropy)
    figures, (against_k, sure) = axes(2)
    against_k.plot(ks, held, "C0", marker="o", markersize=3, label="mass held")
    against_k.plot(ks, covered, "C1", marker="s", markersize=3, label="true next token among them")
    against_k.set(xlabel="k", xscale="log", ylabel="share", ylim=(0, 1.02))
    against_k.set_xticks(ks, [str(at) for at in ks])
    against_k.minorticks_off()
    against_k.legend()
    sure.hist(entropy, 40, color="C0")
    sure.set(xlabel="entropy of {kept ids, tail}, nats", ylabel="positions")
    return [
        heading("Mass and coverage"),
        picture(
            figures, f"Over {len(entropy):,} positions of {len(records):,} rows, evenly spread."
        ),
        table(
            ["k", "mass held", "tail", "true next token among them"],
            [
                [at, f"{m:.4f}", f"{1 - m:.4f}", f"{c:.4f}"]
                for at, m, c in zip(ks, held, covered, strict=True)
            ],
        ),
        note(
            f"Mean entropy {entropy.mean():.3f} nats. The tail counts as one outcome, so the "
            "spread within it is not included."
        ),
    ]


class Look(NamedTuple):
    """One row of P positions."""

    mass: Float64s
    """[k]: mass of the best 1 to k entries, summed over the positions."""
    hits: Float64s
    """[k]: positions whose true next token is among them."""
    entropy: Float64s
    """[P]: nats, of the entries and the tail."""


def look(record: Record, k: int) -> Look:
    ids, logprobs = record.topk.dense(k)
    p = np.exp(logprobs.astype(np.float64))
    following = record.input_ids[record.positions + 1]
    is_next = (ids == following[:, None]) & (p > 0)
    outcomes = np.concatenate([p, np.exp(record.topk.tail_logprob.astype(np.float64))[:, None]], 1)
    entropy = -(outcomes * np.log(np.where(outcomes > 0, outcomes, 1))).sum(1)
    hits = np.maximum.accumulate(is_next, 1).sum(0, dtype=np.float64)
    return Look(p.sum(0).cumsum(), hits, entropy)


def draws(records: list[Record], number: int) -> list[str]:
    """How many different ids the draws of a position hold, and how often the next token."""
    different, hits, positions = 0, 0, 0
    for record in records:
        samples = record.topk.samples
        assert samples is not None
        following = np.repeat(record.input_ids[record.positions + 1], samples.counts)
        different += len(samples.ids)
        hits += int((samples.ids == following).sum())
        positions += len(record.topk)
    return [
        heading("Samples of the tail"),
        table(
            ["draws a position", "different ids", "true next token among them"],
            [[number, f"{different / positions:.2f}", f"{hits / positions:.4f}"]],
        ),
        note(f"Over {positions:,} positions of {len(records):,} rows, evenly spread."),
    ]


def in_words(dump: LogitDataset) -> str:
    """What the dump holds, and what it costs."""
    total, plan = Totals.of(shard.marker for shard in dump.shards), dump.plan
    teacher = plan.get("teacher")
    name = teacher.get("name") if isinstance(teacher, dict) else None
    said = f"{name or 'The teacher'} read {total.tokens:,} tokens in {len(dump):,} sequences."
    if dump.partial:
        said += " The dump is not finished: run the same command again to resume it."
    if total.bytes_per_token is not None:
        said += f" A token takes {total.bytes_per_token:.1f} bytes."
    if total.kept_mass is not None and plan.get("k"):
        said += f" At a position, the stored entries hold {total.kept_mass:.1%} of the probability"
        said += " on average, and one number says what is left."
    if total.codec_kl is not None:
        said += f" Rounding costs {total.codec_kl:.1e} nats of KL."
    return said


def totals(dump: LogitDataset) -> Json:
    """Counts and sizes; nothing is divided where no shard is committed."""
    total = Totals.of(shard.marker for shard in dump.shards)
    has_masks = masked(dump.plan)
    found: Json = {
        "rows": f"{len(dump):,}",
        "tokens": f"{total.tokens:,}",
        **({"targets": f"{total.positions:,}"} if has_masks else {}),
        "shards": total.shards,
        "bytes": f"{total.bytes:,}",
    }
    if total.bytes_per_token is not None and total.codec_kl is not None:
        found |= {
            "bytes per token": f"{total.bytes_per_token:.1f}",
            **({"bytes per target": f"{total.bytes_per_target:.1f}"} if has_masks else {}),
            "mass held": f"{total.kept_mass:.4f}",
            "KL of the codec": f"{total.codec_kl:.2g} nats",
        }
    return found | {"state": "not finished" if dump.partial else "finished"}
