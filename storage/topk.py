"""TopK: the record that passes between the teacher, the codec and the loss."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from storage.errors import InvalidRecord
from storage.samples import Samples, fault
from storage.targets import Bools, Int64s, positions_of

UInt16s = npt.NDArray[np.uint16]
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TopK:
    """Sparse next-token distributions of one sequence, ragged over positions.

    counts        uint16  [P]  entries kept at each position
    ids           int32   [E]  token ids, E = counts.sum(); within a position by descending logprob
    logprobs      float32 [E]  full-vocabulary log-probabilities in nats, temperature 1
    tail_logprob  float32 [P]  log of the probability mass outside the kept ids; -inf if none
    samples       ids drawn from the tail, or None; with k = 0 the tail is everything

    Each is over the token after its position, see Record.
    """

    counts: UInt16s
    ids: Int32s
    logprobs: Floats
    tail_logprob: Floats
    samples: Samples | None = None

    def __len__(self) -> int:
        """Positions P."""
        return len(self.counts)

    @classmethod
    def from_dense(
        cls,
        ids: npt.ArrayLike,
        logprobs: npt.ArrayLike,
        tail: npt.ArrayLike,
        drawn: npt.ArrayLike | None = None,
    ) -> "TopK":
        """k entries at every position, from ids [P, k], logprobs [P, k] (descending), tail [P].

        `drawn` [P, N] adds samples, see Samples.from_drawn.
        """
        ids, logprobs = np.asarray(ids, np.int32), np.asarray(logprobs, np.float32)
        counts = np.full(ids.shape[0], ids.shape[1], np.uint16)
        samples = None if drawn is None else Samples.from_drawn(drawn)
        return cls(
            counts, ids.reshape(-1), logprobs.reshape(-1), np.asarray(tail, np.float32), samples
        )

    def dense(self, k: int | None = None) -> tuple[Int32s, Floats]:
        """(ids [P, k], logprobs [P, k]); missing entries have id 0 and logprob -inf.

        k defaults to the largest count. Raises ValueError for a smaller k.
        """
        width = int(self.counts.max(initial=0))
        k = width if k is None else k
        if k < width:
            raise ValueError(f"k={k} is too small: a position holds {width} entries")
        if len(self.ids) == len(self) * k:  # every position is full: no copy
            return self.ids.reshape(len(self), k), self.logprobs.reshape(len(self), k)
        ids = np.zeros((len(self), k), np.int32)
        logprobs = np.full((len(self), k), -np.inf, np.float32)
        kept = np.arange(k) < self.counts[:, None]
        ids[kept], logprobs[kept] = self.ids, self.logprobs
        return ids, logprobs

    def cut(self, min_prob: float = 0.0, top_p: float = 1.0) -> "TopK":
        """Drop unlikely entries and add their exact mass to the tail.

        Keeps the entries of at least `min_prob`; of those, the fewest that hold `top_p` of the
        mass; and always the best entry of a position. Raises ValueError for a value outside its
        range, and for a record with samples.
        """
        if self.samples is not None:
            raise ValueError(
                "cannot cut a record with samples, which are not drawn from the larger tail: cut "
                "before drawing"
            )
        if not (0 <= min_prob < 1 and 0 < top_p <= 1):
            raise ValueError(
                f"expected min_prob in [0, 1) and top_p in (0, 1], found {min_prob} and {top_p}"
            )
        starts = np.cumsum(self.counts, dtype=np.int64) - self.counts
        keep = self.logprobs >= least_logprob(min_prob)
        if top_p < 1:
            p = np.exp(self.logprobs.astype(np.float64))
            sums = np.concatenate([[0.0], np.cumsum(p)])
            before = sums[:-1] - np.repeat(sums[starts], self.counts)  # mass of the better entries
            keep &= before < top_p
        keep[starts[self.counts > 0]] = True
        return self if keep.all() else self._only(keep)

    def fold(self, vocab_size: int) -> "TopK":
        """Move entries with ids of `vocab_size` and above into the tail, with their exact mass.

        For a student whose head has fewer columns than the teacher's. A position that then holds
        all `vocab_size` ids has no other outcome, so it is scaled to sum to one without a tail.
        Raises ValueError for a record with samples: spread its tail before.
        """
        if self.samples is not None:
            raise ValueError("cannot fold a record with samples; call spread_tail before")
        keep = self.ids < vocab_size
        if keep.all():
            return self
        folded = self._only(keep)
        full = folded.counts == vocab_size
        if not full.any():
            return folded
        lost = np.log(np.maximum(folded.kept_mass(), np.finfo(np.float64).tiny))
        logprobs = folded.logprobs - np.repeat(np.where(full, lost, 0), folded.counts)
        tail = np.where(full, -np.inf, folded.tail_logprob)
        return replace(
            folded, logprobs=logprobs.astype(np.float32), tail_logprob=tail.astype(np.float32)
        )

    def _only(self, keep: Bools) -> "TopK":
        """The entries to keep, bool [E]; the mass of the others goes to the tail."""
        counts = position_sums(keep.view(np.uint8), self.counts).astype(np.uint16)
        # Dropped entries are small: sum them alone, or rounding loses them.
        p = np.exp(self.logprobs.compress(~keep).astype(np.float64))
        dropped = position_sums(p, self.counts - counts)
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN of a teacher stays NaN
            tail = np.logaddexp(self.tail_logprob.astype(np.float64), np.log(dropped))
        ids, logprobs = self.ids.compress(keep), self.logprobs.compress(keep)
        return TopK(counts, ids, logprobs, tail.astype(np.float32))

    def spread_tail(self) -> "TopK":
        """Move the tail's mass to its sampled ids, tail · times / draws each; no tail is left.

        Train on this with forward KL: on average over the draws it is the teacher's whole
        distribution. Sampled ids follow the kept ones, ascending. Without samples returns self.
        """
        samples = self.samples
        if samples is None:
            return self
        shares = np.log(samples.times.astype(np.float32) / np.float32(samples.draws))
        shares += np.repeat(self.tail_logprob, samples.counts)
        counts = self.counts + samples.counts
        starts = np.cumsum(counts, dtype=np.int64) - counts
        ids = np.empty(len(self.ids) + len(samples.ids), np.int32)
        logprobs = np.empty(len(ids), np.float32)
        sampled = np.zeros(len(ids), bool)
        sampled[within(starts + self.counts.astype(np.int64), samples.counts)] = True
        ids[sampled], logprobs[sampled] = samples.ids, shares
        ids[~sampled], logprobs[~sampled] = self.ids, self.logprobs
        return TopK(counts, ids, logprobs, np.full(len(self), -np.inf, np.float32))

    def kept_mass(self) -> npt.NDArray[np.float64]:
        """[P] probability of the kept ids at each position."""
        return position_sums(np.exp(self.logprobs.astype(np.float64)), self.counts)


@dataclass(frozen=True, eq=False)
class Record:
    """One row of a dump: a document, or a chunk of a long one, and its distributions.

    targets  bool [tokens] which tokens are learnt, None for all
    topk     a distribution over each learnt token: entry i is over input_ids[positions[i] + 1]
    """

    doc_id: str
    chunk: int
    input_ids: Int32s
    topk: TopK
    targets: Bools | None = None

    @property
    def positions(self) -> Int64s:
        """int64 [P]: where the distributions stand in the sequence."""
        return positions_of(self.targets, len(self.input_ids))


def within(starts: npt.NDArray[np.int64], counts: UInt16s) -> npt.NDArray[np.int64]:
    """[counts.sum()] for each t the counts[t] indices starts[t], starts[t] + 1, …"""
    before = np.cumsum(counts, dtype=np.int64) - counts
    indices = np.repeat(starts - before, counts)
    indices += np.arange(len(indices))
    return indices


@lru_cache
def least_logprob(p: float) -> np.float32:
    """The least float32, in nats, whose probability in float64 is at least p."""
    if p == 0:
        return np.float32(-np.inf)
    found, end = np.float32(np.log(p)), np.float32(np.inf)
    while np.exp(np.float64(found)) < p:
        found = np.nextafter(found, end)
    while np.exp(np.float64(np.nextafter(found, -end))) >= p:
        found = np.nextafter(found, -end)
    return np.float32(found)


def position_sums(values: npt.NDArray[np.number], counts: UInt16s) -> npt.NDArray[np.float64]:
    """Sum ragged values [E] over each position -> [P]; an empty position gives 0."""
    if len(values) and (counts == counts[0]).all():
        rows = values.reshape(len(counts), -1)
        return np.asarray(rows.sum(axis=1, dtype=np.float64))
    filled = counts > 0
    sums = np.zeros(len(counts))
    if filled.any():
        starts = np.cumsum(counts, dtype=np.int64) - counts
        sums[filled] = np.add.reduceat(values, starts[filled], dtype=np.float64)
    return sums


def codec_kl(original: TopK, stored: TopK) -> npt.NDArray[np.float64]:
    """KL(original ‖ stored) in nats at each position [P], see codec_cost."""
    return codec_cost(original, stored)[0]


def codec_cost(
    original: TopK, stored: TopK
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(KL(original ‖ stored) in nats, probability of the kept ids) at each position [P].

    The KL is over the outcomes {kept ids, tail}, of the normalised original, because engines are
    off by 1e-6. Raises ValueError if the two hold different ids.
    """
    if not np.array_equal(original.ids, stored.ids):
        raise ValueError("the two records hold different ids")
    p = np.exp(original.logprobs.astype(np.float64))
    a = np.exp(original.tail_logprob.astype(np.float64))
    gaps = np.subtract(original.logprobs, stored.logprobs, dtype=np.float64)
    tail_gaps = np.zeros(len(original))
    has_tail = a > 0
    np.subtract(original.tail_logprob, stored.tail_logprob, tail_gaps, where=has_tail)
    mass = position_sums(p, original.counts)
    total = mass + a
    kl = (position_sums(p * gaps, original.counts) + a * tail_gaps) / total - np.log(total)
    return np.asarray(kl, np.float64), mass


def check_topk(topk: TopK, vocab_size: int) -> None:
    """Raise InvalidRecord that names the first position that cannot be stored."""

    def fail(position: int, found: str) -> None:
        raise InvalidRecord(f"position {position}: {found}")

    def position_of(entry: np.integer) -> int:
        return int(np.searchsorted(ends, entry, side="right"))

    counts, entries = topk.counts, len(topk.ids)
    if not entries == len(topk.logprobs) == int(counts.sum(dtype=np.int64)):
        raise InvalidRecord(
            f"counts sum to {int(counts.sum(dtype=np.int64))} entries, found {entries} ids and "
            f"{len(topk.logprobs)} logprobs; all three must agree"
        )
    if len(topk.tail_logprob) != len(topk):
        raise InvalidRecord(
            f"counts has {len(topk)} positions, tail_logprob has {len(topk.tail_logprob)}"
        )
    ends = np.cumsum(counts, dtype=np.int64)
    wrong = np.flatnonzero(~np.isfinite(topk.logprobs) | (topk.logprobs > 1e-3))
    if len(wrong):
        at = wrong[0]
        fail(
            position_of(at),
            f"id {topk.ids[at]} has logprob {topk.logprobs[at]}, expected a finite number of nats, "
            "at most 0: check the teacher's output for NaN, and pass the result of log_softmax",
        )
    tail = topk.tail_logprob
    wrong = np.flatnonzero(np.isnan(tail) | (tail > 1e-3))
    if len(wrong):
        fail(
            int(wrong[0]),
            f"tail_logprob is {tail[wrong[0]]}, expected nats of at most 0, -inf without a tail: "
            "check the teacher's output for NaN, and pass the log of the mass outside the kept ids",
        )
    wrong = np.flatnonzero((topk.ids < 0) | (topk.ids >= vocab_size))
    if len(wrong):
        at = wrong[0]
        fail(position_of(at), f"id {topk.ids[at]} is outside the vocabulary of {vocab_size}")
    if len(counts) and (counts == counts[0]).all():  # many short sorts beat one long one
        rows = np.sort(topk.ids.reshape(len(topk), -1), axis=1)
        twice = np.argwhere(rows[:, 1:] == rows[:, :-1])
        if len(twice):
            fail(int(twice[0, 0]), f"id {rows[tuple(twice[0])]} appears twice")
    else:
        narrow = len(topk) * vocab_size < 1 << 31  # these are sorted in half the time
        first_keys = (np.arange(len(topk)) * vocab_size).astype(np.int32 if narrow else np.int64)
        keys = np.sort(np.repeat(first_keys, counts) + topk.ids)
        again = np.flatnonzero(keys[1:] == keys[:-1])
        if len(again):
            where, token = divmod(int(keys[again[0]]), vocab_size)
            fail(where, f"id {token} appears twice")
    rises = topk.logprobs[1:] > topk.logprobs[:-1]
    rises[ends[(ends > 0) & (ends < entries)] - 1] = False  # from one position to the next
    if rises.any():
        fail(
            position_of(np.flatnonzero(rises)[0]), "entries are not in order of descending logprob"
        )
    empty = np.flatnonzero((counts == 0) & np.isneginf(tail))
    if len(empty):
        fail(int(empty[0]), "no entry and no tail, so no probability mass")
    samples = topk.samples
    if samples is None:
        return
    wrong_samples = fault(samples, vocab_size)
    if wrong_samples:
        raise InvalidRecord(wrong_samples)
    check_samples_belong(topk, samples)
    sampled, own = (
        np.repeat(np.arange(len(topk)) * vocab_size, part.counts) + part.ids
        for part in (samples, topk)
    )
    both = sampled[np.isin(sampled, own, assume_unique=True)]
    if len(both):
        where, token = divmod(int(both[0]), vocab_size)
        fail(where, f"id {token} is both kept and sampled from the tail")


def check_samples_belong(topk: TopK, samples: Samples) -> None:
    """Raise InvalidRecord if the samples do not fit the tails of these distributions."""
    if len(samples.counts) != len(topk):
        raise InvalidRecord(
            f"{len(topk)} positions, but the samples have {len(samples.counts)} positions"
        )
    wrong = np.flatnonzero((samples.counts > 0) != np.isfinite(topk.tail_logprob))
    if len(wrong):
        at = int(wrong[0])
        raise InvalidRecord(
            f"position {at}: {samples.counts[at]} sampled ids with a tail of "
            f"{topk.tail_logprob[at]} nats; exactly the positions with a tail have samples"
        )
    if int((topk.counts.astype(np.int64) + samples.counts).max(initial=0)) > 65535:
        raise InvalidRecord("a position has more than 65535 kept and sampled ids")
