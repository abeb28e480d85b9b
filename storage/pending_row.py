"""A record becomes a row: what it must be, its grid, and its sums for the marker."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.codec import samples as sampled
from storage.codec.codec import AnyGrid, kept, quantised, restored
from storage.errors import CorruptShard, InvalidRecord
from storage.parsing import MASS_BINS, MOST_K, Json
from storage.plan import masked
from storage.targets import Bools, positions_of
from storage.topk import Int32s, Record, TopK, codec_cost


class PendingRow(NamedTuple):
    """A checked row that is not in the file yet."""

    doc_id: str
    chunk: int
    input_ids: Int32s
    samples: bytes  # encoded; empty without samples
    grid: AnyGrid
    targets: Bools | None  # None in a dump without masks


def learning(rows: Sequence[PendingRow]) -> tuple[list[tuple[Int32s, Any]], list[Bools | None]]:
    """What tables are learnt from: (input ids, grid) of each row, in the codec's kind of grid, and
    the masks."""
    return [(row.input_ids, row.grid) for row in rows], [row.targets for row in rows]


@dataclass
class Sums:
    """Sums over the rows of a shard, which its marker repeats; see FORMAT.md."""

    rows: int = 0
    tokens: int = 0
    positions: int = 0
    entries: int = 0
    sampled_ids: int = 0
    sample_bytes: int = 0
    mass: float = 0.0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(MASS_BINS, np.int64))

    def add(self, row: PendingRow, topk: TopK) -> None:
        """Count a row that stores these distributions."""
        kl, mass = codec_cost(topk, restored(row.grid))
        self.rows += 1
        self.tokens += len(row.input_ids)
        self.positions += len(topk)
        self.entries += len(topk.ids)
        if topk.samples is not None:
            self.sampled_ids += len(topk.samples.ids)
            self.sample_bytes += len(row.samples)
        self.mass += float(mass.sum())
        bins = np.clip((mass * MASS_BINS).astype(np.int64), 0, MASS_BINS - 1)
        self.histogram += np.bincount(bins, minlength=MASS_BINS)
        self.kl_sum += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max(initial=0)))

    def marker(self, draws: int) -> Json:
        """The entries of the marker."""
        samples = {"sampled_ids": self.sampled_ids, "sample_bytes": self.sample_bytes}
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "positions": self.positions,
            "entries": self.entries,
            **(samples if draws else {}),
            "mass": self.mass,
            "mass_histogram": self.histogram.tolist(),
            "kl_sum": self.kl_sum,
            "kl_max": self.kl_max,
        }


class RowMaker:
    """Makes the rows of a shard `name` of a dump with this plan."""

    def __init__(self, plan: Json, name: str) -> None:
        self.name, self.masked = name, masked(plan)
        self.vocab_size, self.step = int(plan["vocab_size"]), float(plan["step"])
        self.k = int(plan.get("k", min(self.vocab_size, MOST_K)))
        self.codec, self.draws = str(plan.get("codec", "v1")), int(plan.get("samples", 0))

    def make(self, record: Record) -> tuple[PendingRow, TopK]:
        """(the row, the distributions that it stores).

        Raises InvalidRecord that names the document if it must not be stored.
        """
        where = f"document {record.doc_id!r}, chunk {record.chunk}"
        targets = self.mask_of(record, where)
        ids = np.asarray(record.input_ids, np.int32)
        self.check(record, ids, targets, where)
        topk = kept(record.topk, self.step, self.codec)
        try:
            grid = quantised(topk, self.vocab_size, self.step, self.codec)
        except InvalidRecord as error:
            raise InvalidRecord(f"{where}: {error}") from None
        samples = self.encode_samples(record.topk)
        row = PendingRow(record.doc_id, record.chunk, ids, samples, grid.narrow(), targets)
        return row, topk

    def check(self, record: Record, ids: Int32s, targets: Bools | None, where: str) -> None:
        """Raise InvalidRecord unless a reader may accept the row."""
        positions = len(positions_of(targets, len(ids)))
        if len(record.topk) != positions:
            learnt = f", {positions} of them targets," if self.masked else ""
            raise InvalidRecord(
                f"{where}: {len(ids)} tokens{learnt} need {positions} distributions, "
                f"found {len(record.topk)}"
            )
        broken = np.isnan(record.topk.tail_logprob)
        if not (record.topk.logprobs <= 1).all():  # NaN is not
            broken |= ~np.isfinite(record.topk.kept_mass())
        if broken.any():
            at = int(np.flatnonzero(broken)[0])
            raise InvalidRecord(
                f"{where}: the teacher gave NaN or Inf at position {at}; this shard is not "
                "committed. Check the model's weights, or load it in float32"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidRecord(
                f"{where}: expected input ids from 0 to {self.vocab_size - 1}, found {ids.min()} "
                f"to {ids.max()}; use the model's own tokenizer"
            )
        longest = int(record.topk.counts.max(initial=0))
        if longest > self.k:
            raise InvalidRecord(
                f"{where}: {longest} entries at a position, the plan has k {self.k}"
            )
        drawn = record.topk.samples.draws if record.topk.samples else 0
        if drawn != self.draws:
            raise InvalidRecord(f"{where}: {drawn} draws, the plan has samples: {self.draws}")

    def mask_of(self, record: Record, where: str) -> Bools | None:
        """The mask to store, bool [tokens]; None in a dump without masks. Raises InvalidRecord."""
        tokens, given = len(record.input_ids), record.targets
        if not tokens:
            raise InvalidRecord(f"{where}: no tokens; leave the row out")
        if given is not None and not self.masked:
            raise InvalidRecord(
                f"{where}: a mask of targets, but the plan has no `targets`: add them to the plan, "
                "or store the distributions of all tokens"
            )
        if not self.masked:
            return None
        mask = np.ones(tokens, bool) if given is None else np.array(given)
        if mask.dtype != bool or mask.shape != (tokens,):
            raise InvalidRecord(
                f"{where}: expected targets bool [{tokens}], a mark for each token, found "
                f"{mask.dtype} {list(mask.shape)}"
            )
        mask[0] = False  # nothing predicts it
        if not mask.any():
            raise InvalidRecord(
                f"{where}: expected a target among the tokens after the first, found none; leave "
                "the row out"
            )
        return mask

    def encode_samples(self, topk: TopK) -> bytes:
        """A record's samples, encoded. Raises CorruptShard if they do not decode to the same."""
        if topk.samples is None:
            return b""
        data = sampled.pack(topk.samples, self.vocab_size)
        if not sampled.unpack(data).same(topk.samples):
            raise CorruptShard(
                f"{self.name}: encoded samples do not decode to the same samples; nothing is "
                "committed. Please report this"
            )
        return data
