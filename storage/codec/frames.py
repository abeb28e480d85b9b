"""The parts of every payload: a header, and byte planes in checksummed zstd frames."""

import struct
import threading
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from storage.codec.grid import MAX_STEP, Integers
from storage.errors import CorruptPayload, FormatVersionError

MAGIC = b"MoLk"
# magic, version, planes of counts (0: all equal) / ids / steps / best / tails, step, vocabulary,
# positions, entries, checksum of the tables needed to decode (0: none), checksum of the header
HEADER = struct.Struct("<4sBBBBBBxxdIIQII")
# Four-byte matches in such planes are chance; they cost more than entropy-coded literals.
PARAMETERS = zstandard.ZstdCompressionParameters(
    compression_level=1, min_match=7, write_content_size=True, write_checksum=True
)
# The same for the input ids of a row, which are few and repeat.
HEAD_PARAMETERS = zstandard.ZstdCompressionParameters(
    compression_level=3, write_content_size=True, write_checksum=False
)
MAX_POSITIONS, MAX_ENTRIES = 1 << 24, 1 << 31
MAX_RATIO = 1 << 15  # zstd: a block of four bytes gives at most 128 KiB


# What a payload may claim for each of its bytes, and whatever its size. Real payloads hold about
# one entry per byte; only constants come near the limit.
MOST_PER_BYTE, FREE_POSITIONS, FREE_ENTRIES = 1 << 10, 1 << 20, 1 << 22


class Limits(NamedTuple):
    """What the row of a payload allows."""

    positions: int  # of the row: its tokens less one, or its targets
    k: int  # entries of a position at most; of samples: the number of draws
    vocab_size: int
    entries: int = MAX_ENTRIES  # of the row at most


def check_size(size: int, positions: int, entries: int, most_each: int) -> None:
    """Raise CorruptPayload for a header whose arrays cannot be in `size` bytes."""
    most_positions = min(MAX_POSITIONS, max(FREE_POSITIONS, MOST_PER_BYTE * size))
    most_entries = min(MAX_ENTRIES, max(FREE_ENTRIES, MOST_PER_BYTE * size), positions * most_each)
    if positions > most_positions or entries > most_entries:
        raise CorruptPayload(
            f"impossible header: {positions} positions, {entries} entries in {size} bytes; "
            f"expected at most {most_positions} and {most_entries}"
        )


def check_limits(positions: int, entries: int, vocab_size: int, limits: Limits | None) -> None:
    """Raise CorruptPayload for a header that does not fit its row."""
    if limits is None:
        return
    if positions != limits.positions:
        raise CorruptPayload(f"{positions} positions; its row has {limits.positions}")
    if entries > min(limits.entries, positions * limits.k):
        raise CorruptPayload(
            f"{entries} entries in a row, expected at most {limits.k} at each of {positions} "
            f"positions, and at most {limits.entries} in all"
        )
    if vocab_size != limits.vocab_size:
        raise CorruptPayload(f"a vocabulary of {vocab_size} ids, the plan says {limits.vocab_size}")


class Planes(NamedTuple):
    """Bytes per number of each array of a payload; 0 if all its numbers are zero."""

    counts: int  # 2, or 0 if all positions hold equally many entries
    ids: int
    steps: int  # version 2: the spreads
    best: int
    tails: int

    @property
    def total(self) -> int:
        """Frames of all arrays; counts always has two."""
        return 2 + sum(self[1:])


class Header(NamedTuple):
    """The first 44 bytes of a payload, checked."""

    version: int
    planes: Planes
    step: float
    vocab_size: int
    positions: int
    entries: int
    needs: int  # CRC-32 of the tables needed to decode, 0 for none

    def pack(self) -> bytes:
        values = (self.step, self.vocab_size, self.positions, self.entries, self.needs)
        head = HEADER.pack(MAGIC, self.version, *self.planes, *values, 0)[:-4]
        return head + struct.pack("<I", zlib.crc32(head))

    @classmethod
    def unpack(
        cls, data: bytes, versions: tuple[int, ...], limits: Limits | None = None
    ) -> "Header":
        """Read and check a header. Raises CorruptPayload or FormatVersionError."""
        if len(data) < HEADER.size or data[:4] != MAGIC:
            raise CorruptPayload(
                f"not a payload: {len(data)} bytes that start with {bytes(data[:4])!r}, expected "
                f"{HEADER.size} or more that start with {MAGIC!r}"
            )
        _, version, *widths, step, vocab_size, positions, entries, needs, checksum = HEADER.unpack(
            data[: HEADER.size]
        )
        planes = Planes(*widths)
        if version not in versions:
            raise FormatVersionError(
                f"payload of version {version}, this release reads versions "
                f"{', '.join(map(str, versions))}; update mol-distill"
            )
        if zlib.crc32(data[: HEADER.size - 4]) != checksum:
            raise CorruptPayload("header checksum does not match: the payload is damaged")
        check_limits(positions, entries, vocab_size, limits)
        check_size(len(data), positions, entries, min(vocab_size, 65535))
        if vocab_size > 1 << 31:
            raise CorruptPayload(f"impossible header: a vocabulary of {vocab_size} ids")
        if not 0 < step < MAX_STEP:  # false for NaN too
            raise CorruptPayload(f"impossible header: step {step}")
        if planes.counts not in (0, 2) or max(planes[1:]) > 4:
            raise CorruptPayload(f"impossible header: planes {tuple(planes)}")
        return cls(version, planes, step, vocab_size, positions, entries, needs)


class Contexts(threading.local):
    """The zstd contexts of a thread. Making one costs more than a frame of a row."""

    def __init__(self) -> None:
        self.planes = zstandard.ZstdCompressor(compression_params=PARAMETERS)
        self.heads = zstandard.ZstdCompressor(compression_params=HEAD_PARAMETERS)
        self.frames = zstandard.ZstdDecompressor()


CONTEXTS = Contexts()


def split_planes(values: Integers, planes: int | None = None) -> list[bytes]:
    """Non-negative integers [n] -> one string of n bytes per significant byte, lowest first."""
    if planes is None:
        planes = (int(values.max(initial=0)).bit_length() + 7) // 8
    raw = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return [raw[:, plane].tobytes() for plane in range(planes)]


def deflate(groups: list[list[bytes]]) -> list[bytes]:
    """Compress each plane of all groups to a zstd frame."""
    return [CONTEXTS.planes.compress(plane) for group in groups for plane in group]


def join(header: bytes, parts: list[bytes]) -> bytes:
    """The header, the length of each part, the parts."""
    lengths = struct.pack(f"<{len(parts)}I", *(len(part) for part in parts))
    return b"".join([header, lengths, *parts])


class Frames:
    """The parts after a payload's header, read in order. Sizes are checked before allocation."""

    def __init__(self, data: bytes, number: int, start: int = HEADER.size) -> None:
        end = start + 4 * number
        if len(data) < end:
            raise CorruptPayload(f"cut short: {len(data)} bytes, expected at least {end}")
        self.lengths = list(struct.unpack_from(f"<{number}I", data, start))
        if end + sum(self.lengths) != len(data):
            raise CorruptPayload(f"{end + sum(self.lengths)} bytes expected, {len(data)} found")
        self.data, self.at = memoryview(data), end

    def counts(self, header: Header) -> npt.NDArray[np.uint16]:
        """uint16 [P], checked against the header's entries."""
        equal, positions = header.planes.counts == 0, header.positions
        counts = self.take(2, min(positions, 1) if equal else positions).astype(np.uint16)
        counts = np.repeat(counts, positions) if equal else counts
        entries = int(counts.sum(dtype=np.int64))
        if entries != header.entries:
            raise CorruptPayload(f"counts sum to {entries}, header says {header.entries}")
        return counts

    def take(self, planes: int, size: int) -> Integers:
        """Join the next byte planes to integers [size]; without planes, all are zero."""
        if planes < 2:
            return self.inflate(size) if planes else np.zeros(size, np.uint8)
        dtype = np.dtype("<u2") if planes == 2 else np.dtype("<u4")
        joined = np.zeros((size, dtype.itemsize), np.uint8)
        for plane in range(planes):
            joined[:, plane] = self.inflate(size)
        values: Integers = joined.view(dtype).reshape(-1)
        return values

    def part(self) -> memoryview:
        """The next part, unchanged."""
        length = self.lengths.pop(0)
        self.at += length
        return self.data[self.at - length : self.at]

    def inflate(self, size: int) -> npt.NDArray[np.uint8]:
        """Decompress the next frame, which must hold `size` bytes; allocates no more."""
        return np.frombuffer(inflate(self.part(), size), np.uint8)


def inflate(frame: "bytes | memoryview", size: int) -> bytes:
    """Decompress a zstd frame. Raises CorruptPayload unless it holds `size` bytes."""
    try:
        found = zstandard.frame_content_size(frame)
        if found != size:
            raise CorruptPayload(f"{size} bytes expected in a frame, it claims {found}")
        if size > MAX_RATIO * len(frame):
            raise CorruptPayload(f"a frame of {len(frame)} bytes cannot hold {size}")
        plane = CONTEXTS.frames.decompress(
            frame,
            max_output_size=size,
            allow_extra_data=True,  # a row head may follow
        )
    except zstandard.ZstdError as error:
        raise CorruptPayload(f"zstd: {error}") from None
    if len(plane) != size:
        raise CorruptPayload(f"{size} bytes expected in a frame, found {len(plane)}")
    return plane
