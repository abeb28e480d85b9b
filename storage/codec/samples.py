"""The lossless payload of samples: gaps between ascending ids, and times, in byte planes.

It has its own column. The payload of the kept entries is the same with samples or without.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from storage.codec.frames import (
    Frames,
    Limits,
    check_limits,
    check_size,
    deflate,
    join,
    split_planes,
)
from storage.errors import CorruptPayload, FormatVersionError
from storage.samples import Samples, fault

MAGIC, VERSION = b"MoLs", 1
# magic, version, planes of counts / gaps / times, draws, vocabulary, positions, entries, checksum
HEADER = struct.Struct("<4sBBBBHxxIIQI")


class Planes(NamedTuple):
    """Bytes per number of each array."""

    counts: int
    gaps: int
    times: int


class Header(NamedTuple):
    """The first 32 bytes, checked."""

    planes: Planes
    draws: int
    vocab_size: int
    positions: int
    entries: int

    def pack(self) -> bytes:
        numbers = (self.draws, self.vocab_size, self.positions, self.entries)
        head = HEADER.pack(MAGIC, VERSION, *self.planes, *numbers, 0)[:-4]
        return head + struct.pack("<I", zlib.crc32(head))

    @classmethod
    def unpack(cls, data: bytes, limits: Limits | None = None) -> "Header":
        """Read and check a header. Raises CorruptPayload or FormatVersionError."""
        if len(data) < HEADER.size or data[:4] != MAGIC:
            raise CorruptPayload(
                f"not samples: {len(data)} bytes that start with {data[:4]!r}, expected "
                f"{HEADER.size} or more that start with {MAGIC!r}"
            )
        _, version, *widths, draws, vocab_size, positions, entries, checksum = HEADER.unpack(
            data[: HEADER.size]
        )
        planes = Planes(*widths)
        if version != VERSION:
            raise FormatVersionError(
                f"samples of version {version}, this release reads version {VERSION}; update "
                "mol-distill"
            )
        if zlib.crc32(data[: HEADER.size - 4]) != checksum:
            raise CorruptPayload("samples: header checksum does not match: they are damaged")
        check_limits(positions, entries, vocab_size, limits)
        check_size(len(data), positions, entries, min(draws, vocab_size))
        if limits is not None and draws != limits.k:
            raise CorruptPayload(f"samples: {draws} draws, the plan says {limits.k}")
        # Gaps always have a plane, whose frame limits what a false number of entries can allocate.
        if max(planes.counts, planes.times) > 2 or not 1 <= planes.gaps <= 4:
            raise CorruptPayload(f"impossible samples: planes {tuple(planes)}")
        return cls(planes, draws, vocab_size, positions, entries)


def pack(samples: Samples, vocab_size: int) -> bytes:
    """Encode samples in which `fault` finds nothing wrong."""
    gaps = np.diff(samples.ids, prepend=-1).astype(np.int64) - 1
    first = (np.cumsum(samples.counts, dtype=np.int64) - samples.counts)[samples.counts > 0]
    gaps[first] = samples.ids[first]
    width = max(1, (int(gaps.max(initial=0)).bit_length() + 7) // 8)
    groups = [
        split_planes(samples.counts),
        split_planes(gaps, width),
        split_planes(samples.times - 1),
    ]
    planes = Planes(*(len(group) for group in groups))
    header = Header(planes, samples.draws, vocab_size, len(samples.counts), len(samples.ids))
    return join(header.pack(), deflate(groups))


def unpack(data: bytes, limits: Limits | None = None) -> Samples:
    """The inverse of pack. Whatever the bytes, raises only CorruptPayload or FormatVersionError."""
    header = Header.unpack(data, limits)
    frames = Frames(data, sum(header.planes), HEADER.size)
    counts = frames.take(header.planes.counts, header.positions).astype(np.uint16)
    entries = int(counts.sum(dtype=np.int64))
    if entries != header.entries:
        raise CorruptPayload(f"samples: counts sum to {entries}, header says {header.entries}")
    gaps = frames.take(header.planes.gaps, header.entries)
    if header.entries and int(gaps.max()) >= header.vocab_size:
        raise CorruptPayload(f"samples: an id outside the vocabulary of {header.vocab_size}")
    times = frames.take(header.planes.times, header.entries).astype(np.int64) + 1
    ends = np.cumsum(gaps.astype(np.int64) + 1)
    first = (np.cumsum(counts, dtype=np.int64) - counts)[counts > 0]
    before = ends[first] - gaps[first] - 1
    ids = ends - np.repeat(before, counts[counts > 0]) - 1
    if int(max(ids.max(initial=0), times.max(initial=0))) > 0x7FFFFFFF:
        raise CorruptPayload("samples: a number above 2^31 - 1")
    samples = Samples(
        header.draws, counts, ids.astype(np.int32), np.minimum(times, 65535).astype(np.uint16)
    )
    wrong = fault(samples, header.vocab_size)
    if wrong:
        raise CorruptPayload(f"samples: {wrong}")
    return samples
