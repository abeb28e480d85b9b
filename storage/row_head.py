"""The head of a row: what, beside the payload, a reader of one row needs, and which row it is.

A head stands in the row's payload, after the first zstd frame, as a zstd skippable frame (RFC 8878,
3.1.2). Decoders skip it, so every release reads such payloads. For a dump of before, the heads are
in its index. FORMAT.md is the specification.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from storage.codec.frames import CONTEXTS, HEADER, inflate, split_planes
from storage.errors import CorruptShard, FormatVersionError
from storage.targets import Bools, pack_mask, unpack_mask
from storage.topk import Int32s

MAGIC = b"MoLr"
PLAIN, MASKED = 1, 2  # versions: the second also holds the mask of the learnt tokens
SKIPPABLE = struct.pack("<I", 0x184D2A5D)
# magic, version, planes of the ids, partition, shard, row, chunk, tokens, bytes of the document's
# id, CRC-32 of the samples, start of the plan's sha256
FIELDS = struct.Struct("<4sBB2xIIIiIII8s")
END = struct.Struct("<II")  # bytes of the head, CRC-32


@dataclass(frozen=True)
class RowHead:
    """Which row it is, and its columns beside payload and samples.

    shard        "00003/00007"
    row          its number in the shard
    plan_sha256  hexadecimal; the first 16 digits are stored
    samples_crc  CRC-32 of the encoded samples; 0 without samples
    targets      bool [tokens] which tokens are learnt, None for all
    """

    shard: str
    row: int
    plan_sha256: str
    doc_id: str
    chunk: int
    input_ids: Int32s
    samples_crc: int = 0
    targets: Bools | None = None

    def body(self) -> bytes:
        """The head without its checksum, which also covers the payload."""
        planes = split_planes(self.input_ids)
        masks = [] if self.targets is None else [pack_mask(self.targets)]
        frames = [CONTEXTS.heads.compress(part) for part in (*planes, *masks)]
        doc_id = self.doc_id.encode()
        partition, shard = map(int, self.shard.split("/"))
        numbers = (partition, shard, self.row, self.chunk, len(self.input_ids), len(doc_id))
        plan = bytes.fromhex(self.plan_sha256[:16])
        version = MASKED if masks else PLAIN
        fields = FIELDS.pack(MAGIC, version, len(planes), *numbers, self.samples_crc, plan)
        lengths = struct.pack(f"<{len(frames)}I", *map(len, frames))
        body = b"".join([fields, lengths, doc_id, *frames])
        return body + struct.pack("<I", len(body) + END.size)

    def pack(self, before: bytes, after: bytes) -> bytes:
        """The head of the payload `before` + `after`, with its checksum."""
        body = self.body()
        return body + struct.pack("<I", checksum(body, before, after))

    @classmethod
    def unpack(
        cls, head: bytes, before: bytes | memoryview, after: bytes | memoryview
    ) -> "RowHead":
        """The inverse of pack. Raises CorruptShard and FormatVersionError."""
        if len(head) < FIELDS.size + END.size or head[:4] != MAGIC:
            raise CorruptShard("expected the head of a row, found other bytes")
        _, version, planes, *numbers, samples_crc, plan = FIELDS.unpack_from(head)
        if version not in (PLAIN, MASKED):
            raise FormatVersionError(
                f"row head of version {version}, this release reads versions {PLAIN} and {MASKED}; "
                "update mol-distill"
            )
        size, crc = END.unpack_from(head, len(head) - END.size)
        if size != len(head) or crc != checksum(head[:-4], before, after):
            raise CorruptShard("the row's checksum does not match its bytes")
        partition, shard, row, chunk, tokens, length = numbers
        frames = planes + (version == MASKED)
        start = FIELDS.size + 4 * frames
        if planes > 4 or start + length + END.size > len(head):
            raise CorruptShard(f"impossible row head: {planes} planes, an id of {length} bytes")
        lengths = struct.unpack_from(f"<{frames}I", head, FIELDS.size)
        ends = np.cumsum([start + length, *lengths]).tolist()
        if ends[-1] != len(head) - END.size:
            raise CorruptShard(f"impossible row head: {ends[-1]} bytes, found {len(head)}")
        doc_id = head[start : start + length].decode()
        raw = np.zeros((tokens if planes else 0, 4), np.uint8)
        for plane in range(planes):
            data = inflate(head[ends[plane] : ends[plane + 1]], tokens)
            raw[:, plane] = np.frombuffer(data, np.uint8)
        input_ids = raw.reshape(-1).view("<i4").astype(np.int32, copy=False)
        if not planes:
            input_ids = zeros(tokens)
        targets = None
        if version == MASKED:
            bits = inflate(head[ends[planes] : ends[frames]], (tokens + 7) // 8)
            targets = unpack_mask(bits, tokens)
        return cls(
            f"{partition:05d}/{shard:05d}", row, plan.hex(), doc_id, chunk, input_ids,
            samples_crc, targets,
        )  # fmt: skip

    def same(self, other: "RowHead") -> bool:
        """Whether both are the head of the same row, with the same contents."""
        mine, others = (
            (h.shard, h.row, h.plan_sha256[:16], h.doc_id, h.chunk, h.samples_crc,
             None if h.targets is None else pack_mask(h.targets))
            for h in (self, other)
        )  # fmt: skip
        return mine == others and np.array_equal(self.input_ids, other.input_ids)

    def check(self, shard: str, row: int, plan_sha256: str, tokens: int) -> None:
        """Raise CorruptShard if this is the head of another row."""
        found = (self.shard, self.row, self.plan_sha256[:16], len(self.input_ids))
        if found != (shard, row, plan_sha256[:16], tokens):
            raise CorruptShard(
                f"expected row {row} of shard {shard}, of {tokens} tokens, found row {self.row} of "
                f"shard {self.shard}, of {len(self.input_ids)} tokens"
                + ("" if found[2] == plan_sha256[:16] else ", of a dump made from another plan")
            )


def zeros(tokens: int) -> Int32s:
    """Ids that are all 0, as many as a frame could hold."""
    if tokens > 1 << 24:
        raise CorruptShard(f"impossible row head: {tokens} tokens without a plane")
    return np.zeros(tokens, np.int32)


def checksum(body: bytes, before: bytes | memoryview, after: bytes | memoryview) -> int:
    """CRC-32 of a head and its payload, less the payload's last four bytes: a checksum too."""
    return zlib.crc32(after[:-4], zlib.crc32(before, zlib.crc32(body)))


def insert(payload: bytes, head: RowHead) -> bytes:
    """The payload with the head in its first part."""
    start, end = first_part(payload)
    body, after = head.body(), payload[end:]
    size = len(body) + 4
    before = payload[: HEADER.size] + struct.pack("<I", end - start + 8 + size)
    before += payload[HEADER.size + 4 : end]
    packed = body + struct.pack("<I", checksum(body, before, after))
    value = b"".join([before, SKIPPABLE, struct.pack("<I", size), packed, after])
    if value[4] == 2:  # version 2 ends with a checksum of all before it
        value = value[:-4] + struct.pack("<I", zlib.crc32(value[:-4]))
    return value


def find(payload: bytes) -> RowHead | None:
    """The head in a payload; None for a payload of before. Raises as RowHead.unpack."""
    start, end = first_part(payload)
    if end - start < END.size or end > len(payload):
        return None
    (size,) = struct.unpack_from("<I", payload, end - END.size)
    at = end - size
    if at - 8 < start or payload[at - 8 : at - 4] != SKIPPABLE:
        return None
    if struct.unpack_from("<I", payload, at - 4) != (size,):
        return None
    view = memoryview(payload)
    return RowHead.unpack(payload[at:end], view[: at - 8], view[end:])


def first_part(payload: bytes) -> tuple[int, int]:
    """Where the first part of a payload starts and ends. Raises CorruptShard."""
    if len(payload) < HEADER.size + 4:
        raise CorruptShard(f"a payload of {len(payload)} bytes, expected at least {HEADER.size}")
    start = HEADER.size + 4 * (2 + sum(payload[6:10]) + (2 if payload[4] == 2 else 0))
    (length,) = struct.unpack_from("<I", payload, HEADER.size)
    return start, start + length
