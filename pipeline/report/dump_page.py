"""What a dump holds: how much of the mass, how sure the teacher is, what it takes on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.report.html import axes, heading, note, page, pairs, picture, table
from storage import LogitDataset, Record

ROWS = 300  # read, evenly spread over the dump
Float64s = npt.NDArray[np.float64]


def report(path: str) -> str:
    dump = LogitDataset(path, partial=not (Path(path) / "manifest.json").exists())
    number = min(ROWS, len(dump))
    records = dump.read(np.arange(number) * len(dump) // max(number, 1))
    k = int(dump.plan["k"])
    found = [look(record, k) for record in records]
    mass, hits, entropy = (np.concatenate([of[i] for of in found]) for i in range(3))
    ks = [2**power for power in range(k.bit_length()) if 2**power < k] + [k]
    held = mass.mean(0)[[at - 1 for at in ks]]
    covered = hits.mean(0)[[at - 1 for at in ks]]
    figures, (against_k, sure) = axes(2)
    against_k.plot(ks, held, "C0", marker="o", markersize=3, label="mass held")
    against_k.plot(ks, covered, "C1", marker="s", markersize=3, label="true next token among them")
    against_k.set(xlabel="k", xscale="log", ylabel="share", ylim=(0, 1.02))
    against_k.set_xticks(ks, [str(at) for at in ks])
    against_k.minorticks_off()
    against_k.legend()
    sure.hist(entropy, 40, color="C0")
    sure.set(xlabel="entropy of {kept ids, tail}, nats", ylabel="positions")
    size = totals(dump)
    return page(
        f"Dump {path}",
        [
            pairs(size),
            heading("Mass and coverage"),
            picture(figures, f"Over {len(mass):,} positions of {number:,} rows, evenly spread."),
            table(
                ["k", "mass held", "tail", "true next token among them"],
                [
                    [at, f"{m:.4f}", f"{1 - m:.4f}", f"{c:.4f}"]
                    for at, m, c in zip(ks, held, covered, strict=True)
                ],
            ),
            note(
                f"Mean entropy {entropy.mean():.3f} nats, the tail taken as one outcome: what is "
                "spread within the tail is not counted."
            ),
            heading("Plan"),
            pairs(dump.plan),
        ],
    )


def look(record: Record, k: int) -> tuple[Float64s, npt.NDArray[np.bool_], Float64s]:
    """(mass of the best 1..k [P, k], whether the true next token is among them [P, k], entropy [P])

    of one row.
    """
    ids, logprobs = record.topk.dense(max(k, int(record.topk.counts.max(initial=0))))
    p = np.exp(logprobs.astype(np.float64))
    is_next = (ids == record.input_ids[1:, None]) & (p > 0)
    outcomes = np.concatenate([p, np.exp(record.topk.tail_logprob.astype(np.float64))[:, None]], 1)
    entropy = -(outcomes * np.log(np.where(outcomes > 0, outcomes, 1))).sum(1)
    return p.cumsum(1)[:, :k], np.maximum.accumulate(is_next, 1)[:, :k], entropy


def totals(dump: LogitDataset) -> dict[str, Any]:
    markers = [shard.marker for shard in dump.shards]
    tokens = sum(marker["tokens"] for marker in markers)
    size = sum(marker["bytes"] for marker in markers)
    positions = sum(marker["positions"] for marker in markers)
    return {
        "rows": f"{len(dump):,}",
        "tokens": f"{tokens:,}",
        "shards": len(markers),
        "bytes": f"{size:,}",
        "bytes per token": f"{size / tokens:.1f}",
        "mass held": f"{sum(marker['mass'] for marker in markers) / positions:.4f}",
        "KL of the codec": f"{sum(marker['kl_sum'] for marker in markers) / positions:.2g} nats",
        "state": "not finished" if dump.partial else "finished",
    }
