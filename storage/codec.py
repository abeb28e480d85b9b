"""encode(TopK) -> bytes and decode(bytes) -> TopK, version 1. FORMAT.md is the specification.

Log-probabilities lie on a uniform grid in the log domain, `step` nats apart; ids are renumbered so
that frequent ones are small numbers. Every array is split into byte planes (all low bytes, then all
high bytes), and each plane is a zstd frame with a checksum. Grid differences are stored by rank
(the first differences of all positions, then the second, ...), because they are alike there.
"""

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import zstandard

from storage.errors import CorruptPayload, FormatVersionError, InvalidRecord
from storage.topk import Int32s, TopK, check_topk, position_sums

VERSION = 1
MAGIC = b"MoLk"
# magic, version, planes of counts (0: all equal) / ids / steps / best / tails, step, vocabulary,
# positions, entries, checksum of the rank table (0: none), checksum of the header before it
HEADER = struct.Struct("<4sBBBBBBxxdIIQII")
# Matches of four bytes in such planes are chance, and cost more than the entropy coder's literals.
PARAMETERS = zstandard.ZstdCompressionParameters(
    compression_level=1, min_match=7, write_content_size=True, write_checksum=True
)
MAX_POSITIONS = 1 << 24


@dataclass(frozen=True, eq=False)
class Ranks:
    """A renumbering of the vocabulary: `order[r]` is the token id of rank r, int32 [V].

    `frequent` holds the leading ranks only; all other ids follow in ascending order, so that a
    table costs as many entries as there are ids worth moving.
    """

    frequent: Int32s
    vocab_size: int
    order: Int32s = field(init=False)
    rank_of: Int32s = field(init=False)
    checksum: int = field(init=False)

    def __post_init__(self) -> None:
        frequent = np.ascontiguousarray(self.frequent, np.int32)
        rest = np.ones(self.vocab_size, bool)
        if len(frequent) and not 0 <= frequent.min() <= frequent.max() < self.vocab_size:
            raise CorruptPayload(f"rank table: ids outside the vocabulary of {self.vocab_size}")
        rest[frequent] = False
        order = np.concatenate([frequent, np.flatnonzero(rest)]).astype(np.int32)
        if len(order) != self.vocab_size:
            raise CorruptPayload("rank table: an id stands twice")
        rank_of = np.empty_like(order)
        rank_of[order] = np.arange(self.vocab_size, dtype=np.int32)
        checksum = zlib.crc32(order.astype("<i4").tobytes()) or 1  # 0 says "no table"
        for name, value in [("order", order), ("rank_of", rank_of), ("checksum", checksum)]:
            object.__setattr__(self, name, value)

    @classmethod
    def learn(cls, topks: list[TopK], vocab_size: int) -> "Ranks":
        """Number the ids by how often they stand among the kept entries, most frequent first."""
        frequency = np.zeros(vocab_size, np.int64)
        for topk in topks:
            frequency += np.bincount(topk.ids, minlength=vocab_size)
        seen = int((frequency > 0).sum())
        return cls(np.argsort(-frequency, kind="stable")[:seen].astype(np.int32), vocab_size)


def encode(
    topk: TopK, *, vocab_size: int, step: float = 1 / 16, ranks: Ranks | None = None
) -> bytes:
    """Compress one sequence's distributions.

    `step` is the grid in nats; decoding is off by at most step / 2 per log-probability before it
    renormalises. Raises InvalidRecord for what is no distribution over `vocab_size` ids.
    """
    if not 0 < step < 8:
        raise InvalidRecord(f"step must be between 0 and 8 nats, found {step}")
    if ranks is not None and ranks.vocab_size != vocab_size:
        raise InvalidRecord(f"rank table of {ranks.vocab_size} ids, vocabulary of {vocab_size}")
    check_topk(topk, vocab_size)
    positions, entries = len(topk), len(topk.ids)
    equal = positions == 0 or bool((topk.counts == topk.counts[0]).all())
    ids = topk.ids if ranks is None else ranks.rank_of[topk.ids]
    grid = np.rint(np.maximum(-topk.logprobs.astype(np.float64), 0) / step).astype(np.int64)
    steps = np.diff(grid, prepend=0)
    first = (np.cumsum(topk.counts, dtype=np.int64) - topk.counts)[topk.counts > 0]
    best, steps[first] = grid[first], 0  # a position's best entry is stored by itself
    tails = np.zeros(positions, np.int64)  # 0 says "no tail"
    some = np.isfinite(topk.tail_logprob)
    tails[some] = 1 + np.rint(np.maximum(-topk.tail_logprob[some].astype(np.float64), 0) / step)
    if max(int(grid.max(initial=0)), int(tails.max(initial=0))) >= 1 << 32:
        raise InvalidRecord(f"a log-probability below {-step * 2**32:g} nats has no grid point")
    compressor = zstandard.ZstdCompressor(compression_params=PARAMETERS)
    groups = [
        split_planes(topk.counts[:1] if equal else topk.counts, 2),
        split_planes(ids),
        split_planes(to_rank_major(steps, topk.counts, equal)),
        split_planes(best),
        split_planes(tails),
    ]
    header = HEADER.pack(
        MAGIC,
        VERSION,
        0 if equal else 2,
        *(len(group) for group in groups[1:]),
        step,
        vocab_size,
        positions,
        entries,
        0 if ranks is None else ranks.checksum,
        0,
    )
    header = header[:-4] + struct.pack("<I", zlib.crc32(header[:-4]))
    frames = [compressor.compress(plane) for group in groups for plane in group]
    lengths = struct.pack(f"<{len(frames)}I", *(len(frame) for frame in frames))
    return b"".join([header, lengths, *frames])


def decode(data: bytes, ranks: Ranks | None = None) -> TopK:
    """The inverse of encode, up to the grid; every position sums to one, tail included.

    Raises CorruptPayload or FormatVersionError, never anything else, whatever the bytes.
    """
    if len(data) < HEADER.size or data[:4] != MAGIC:
        raise CorruptPayload(f"not a payload: {len(data)} bytes starting with {bytes(data[:4])!r}")
    (_, version, *planes, step, vocab_size, positions, entries, table, checksum) = HEADER.unpack(
        data[: HEADER.size]
    )
    if version != VERSION:
        raise FormatVersionError(
            f"payload of version {version}; this release reads version {VERSION}: update it"
        )
    if zlib.crc32(data[: HEADER.size - 4]) != checksum:
        raise CorruptPayload("header checksum does not match: the payload is damaged")
    if table != (0 if ranks is None else ranks.checksum):
        raise CorruptPayload(
            "the payload was written with another rank table than the one at hand "
            f"(checksum {table:08x}, here {0 if ranks is None else ranks.checksum:08x}): "
            "take the one in the footer of its own shard"
        )
    if positions > MAX_POSITIONS or entries > positions * 65535 or not 0 < step < 8:
        raise CorruptPayload(f"impossible header: {positions} positions, {entries} entries")
    if planes[0] not in (0, 2) or max(planes[1:]) > 4:
        raise CorruptPayload(f"impossible header: planes {planes}")
    equal = planes[0] == 0
    frames = Frames(data, 2 + sum(planes[1:]))
    counts = frames.take(2, min(positions, 1) if equal else positions).astype(np.uint16)
    counts = np.repeat(counts, positions) if equal else counts
    if int(counts.sum(dtype=np.int64)) != entries:
        raise CorruptPayload(f"counts sum to {counts.sum(dtype=np.int64)}, header says {entries}")
    ids = frames.take(planes[1], entries)
    if entries and int(ids.max()) >= vocab_size:
        raise CorruptPayload(f"id {ids.max()} is outside the vocabulary of {vocab_size}")
    ids = ids if ranks is None else np.take(ranks.order, ids)
    steps = frames.take(planes[2], entries)
    best = frames.take(planes[3], int((counts > 0).sum()))
    tails = frames.take(planes[4], positions)
    return TopK(
        counts,
        ids.astype(np.int32, copy=False),
        *dequantise(counts, steps, best, tails, step, equal),
    )


def dequantise(
    counts: npt.NDArray[np.uint16],
    steps: npt.NDArray[np.integer],
    best: npt.NDArray[np.integer],
    tails: npt.NDArray[np.integer],
    step: float,
    equal: bool,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Grid differences back to logprobs [E] and tail logprobs [P] that sum to one.

    Only differences within a position matter, because it is renormalised: entries are taken
    relative to its best one, so that no sum underflows.
    """
    positions, filled = len(counts), counts > 0
    below = to_descent(steps, counts, equal)  # [E] grid points below the position's best entry
    logprobs = below.astype(np.float32)
    logprobs *= np.float32(-step)
    mass = position_sums(np.exp(logprobs), counts)
    heads = np.zeros(positions, np.float64)
    heads[filled] = -step * best.astype(np.float64)
    tail = np.where(tails == 0, -np.inf, -step * (tails.astype(np.float64) - 1))
    with np.errstate(divide="ignore"):  # the log of an empty position's mass
        log_mass = heads + np.log(mass)
    log_sum = np.logaddexp(log_mass, tail)
    shift = (heads - log_sum).astype(np.float32)
    if equal and positions:
        logprobs.reshape(positions, -1)[...] += shift[:, None]
    else:
        logprobs += np.repeat(shift, counts)
    return logprobs, (tail - log_sum).astype(np.float32)


def rank_order(counts: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """[E] the position-major index of each entry, listed by rank within the position."""
    starts = np.cumsum(counts, dtype=np.int64) - counts
    rank = np.arange(int(counts.sum(dtype=np.int64))) - np.repeat(starts, counts)
    return np.argsort(rank, kind="stable")


def to_rank_major(
    values: npt.NDArray[np.integer], counts: npt.NDArray[np.uint16], equal: bool
) -> npt.NDArray[np.integer]:
    if equal and len(values):
        return np.asarray(values.reshape(len(counts), -1).T.reshape(-1))
    return np.asarray(values[rank_order(counts)])


def to_descent(
    steps: npt.NDArray[np.integer], counts: npt.NDArray[np.uint16], equal: bool
) -> npt.NDArray[np.integer]:
    """Differences [E] by rank -> sums [E] within each position, by position."""
    if equal and len(steps):
        by_rank = steps.reshape(-1, len(counts))
        sums = np.cumsum(by_rank, axis=0, dtype=np.int32)
        return np.asarray(np.ascontiguousarray(sums.T).reshape(-1))
    by_position = np.empty(len(steps), np.int64)
    by_position[rank_order(counts)] = steps
    sums = np.cumsum(by_position)
    starts = np.cumsum(counts, dtype=np.int64) - counts
    filled = counts > 0
    return np.asarray(sums - np.repeat(sums[starts[filled]], counts[filled]))


def split_planes(values: npt.NDArray[np.integer], planes: int | None = None) -> list[bytes]:
    """Non-negative integers [n] -> one byte string per significant byte, lowest first."""
    if planes is None:
        planes = (int(values.max(initial=0)).bit_length() + 7) // 8
    raw = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return [raw[:, plane].tobytes() for plane in range(planes)]


class Frames:
    """The zstd frames behind a payload's header, read in order."""

    def __init__(self, data: bytes, number: int) -> None:
        end = HEADER.size + 4 * number
        if len(data) < end:
            raise CorruptPayload(f"cut short: {len(data)} bytes")
        self.lengths = list(struct.unpack_from(f"<{number}I", data, HEADER.size))
        if end + sum(self.lengths) != len(data):
            raise CorruptPayload(f"{end + sum(self.lengths)} bytes expected, {len(data)} found")
        self.data, self.at = memoryview(data), end
        self.decompressor = zstandard.ZstdDecompressor()

    def take(self, planes: int, size: int) -> npt.NDArray[np.integer]:
        """Join the next byte planes to integers [size]; no planes at all stand for zeros."""
        if planes < 2:
            return self.inflate(size) if planes else np.zeros(size, np.uint8)
        dtype = np.dtype("<u2") if planes == 2 else np.dtype("<u4")
        joined = np.zeros((size, dtype.itemsize), np.uint8)
        for plane in range(planes):
            joined[:, plane] = self.inflate(size)
        values: npt.NDArray[np.integer] = joined.view(dtype).reshape(-1)
        return values

    def inflate(self, size: int) -> npt.NDArray[np.uint8]:
        """Decompress the next frame, which must hold `size` bytes; allocates no more than that."""
        length = self.lengths.pop(0)
        frame = self.data[self.at : self.at + length]
        self.at += length
        try:
            found = zstandard.frame_content_size(frame)
            if found != size:
                raise CorruptPayload(f"a frame of {found} bytes where {size} are expected")
            plane = self.decompressor.decompress(frame, max_output_size=size)
        except zstandard.ZstdError as error:
            raise CorruptPayload(f"zstd: {error}") from None
        if len(plane) != size:
            raise CorruptPayload(f"a frame of {len(plane)} bytes where {size} are expected")
        return np.frombuffer(plane, np.uint8)
