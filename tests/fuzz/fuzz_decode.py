"""Coverage-guided fuzzing of everything that reads untrusted bytes: payloads and tables.

    make fuzz FUZZ_SECONDS=600

The first byte of an input chooses the reader. Checksums are corrected, so that the code behind them
is reached. Whatever the bytes, a reader must return distributions or raise StorageError. The
compiled code checks its bounds here (NUMBA_BOUNDSCHECK), so an access out of bounds is a crash.
"""

import os
import struct
import sys
import zlib
from pathlib import Path

os.environ["NUMBA_BOUNDSCHECK"] = "1"
os.environ.setdefault("NUMBA_CACHE_DIR", "/tmp/numba-boundscheck")  # apart from unchecked code

import atheris
import numpy as np

with atheris.instrument_imports(include=["storage"]):
    import storage  # noqa: F401
    from storage.codec import samples as sampled
    from storage.codec import v3_learning
    from storage.codec.codec import STEPS, decode, quantised, unpack
    from storage.codec.frames import HEADER, Header, Planes, deflate, join
    from storage.codec.grid import dequantise, quantise
    from storage.codec.v1 import Ranks
    from storage.codec.v2_tables import Successors
    from storage.codec.v3_tables import Tables
    from storage.errors import StorageError
    from storage.samples import Samples
    from storage.targets import pack_mask, unpack_mask
    from storage.topk import TopK, check_topk

POSITIONS, VOCAB = 12, 40
RNG = np.random.default_rng(7)
LOGITS = RNG.normal(0, 2, VOCAB) + RNG.normal(0, 1, (POSITIONS, VOCAB))
FULL = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))
IDS = np.argsort(-FULL, axis=1)[:, :8]
BEST = np.take_along_axis(FULL, IDS, 1)
TOPK = TopK.from_dense(IDS, BEST, np.log(1 - np.exp(BEST).sum(axis=1)))
GRID = quantise(TOPK, VOCAB, 1 / 16)
ROOTS = quantised(TOPK, VOCAB, STEPS["v3"], "v3")
INPUT_IDS = np.arange(POSITIONS + 1, dtype=np.int32) % 3
RANKS = Ranks.learn([GRID], VOCAB)
TABLES = Successors.learn([(INPUT_IDS, GRID)], VOCAB)
ROW = TABLES.row(INPUT_IDS)
TABLES_3 = v3_learning.learn([(INPUT_IDS, ROOTS)], VOCAB)
ROW_3 = TABLES_3.row(INPUT_IDS)
LONG = np.arange(30, dtype=np.int32) % 3
MASK = np.isin(np.arange(30), RNG.choice(29, POSITIONS, replace=False) + 1)


def with_checksums(data: bytes, needs: int) -> bytes:
    """A payload whose header says `needs`, with its checksums right."""
    if len(data) < HEADER.size + 4:
        return data
    head = data[: HEADER.size - 8] + struct.pack("<I", needs)
    body = head + struct.pack("<I", zlib.crc32(head)) + data[HEADER.size : -4]
    return body + struct.pack("<I", zlib.crc32(body))


def version_3(data: bytes, needs: int) -> bytes:
    """As with_checksums: the last one is of the header and the second part."""
    if len(data) < HEADER.size + 12:
        return data
    head = version_1(data, needs)[: HEADER.size]
    parts = data[HEADER.size : HEADER.size + 8]
    (first,) = struct.unpack_from("<I", parts)
    coded = data[HEADER.size + 8 :][min(first, 1 << 20) : -4]
    return head + data[HEADER.size : -4] + struct.pack("<I", zlib.crc32(coded, zlib.crc32(head)))


def version_1(data: bytes, needs: int) -> bytes:
    head = data[: HEADER.size - 8] + struct.pack("<I", needs)
    return head + struct.pack("<I", zlib.crc32(head)) + data[HEADER.size :]


def assembled(data: bytes) -> bytes:
    """A version 1 payload with planes from the input and correct zstd checksums."""
    source = atheris.FuzzedDataProvider(data)
    planes = [source.PickValueInList([0, 2]), *(source.ConsumeIntInRange(0, 4) for _ in range(4))]
    positions = source.ConsumeIntInRange(0, 20)
    counts = source.ConsumeBytes(2 if planes[0] == 0 and positions else 2 * positions)
    half = len(counts) // 2
    entries = sum(counts[:half]) + 256 * sum(counts[half:])
    entries = entries * positions if planes[0] == 0 else entries
    sizes = [half, half]
    for number, size in zip(planes[1:], (entries, entries, positions, positions), strict=True):
        sizes += [size] * number
    parts = [counts[:half], counts[half:]]
    parts += [source.ConsumeBytes(min(size, 4096)).ljust(size, b"\0") for size in sizes[2:]]
    step = source.PickValueInList([1 / 16, 1e-300, 7.9])
    header = Header(1, Planes(*planes), step, 1 << 20, positions, entries, 0)
    return join(header.pack(), deflate([parts]))


def read(data: bytes) -> None:
    if not data:
        return
    how, data = data[0] % 11, data[1:]
    try:
        if how == 0:
            decode(data)
        elif how == 1:
            dequantise(unpack(version_1(data, RANKS.checksum), RANKS))
        elif how == 2:
            topk = decode(with_checksums(data, ROW.checksum), ROW)
            check_topk(topk, VOCAB)
        elif how == 7:
            row = TABLES.row(LONG, unpack_mask(data[:4], len(LONG)))
            check_topk(decode(with_checksums(data[4:], row.checksum), row), VOCAB)
        elif how == 8:
            check_topk(decode(version_3(data, ROW_3.checksum), ROW_3), VOCAB)
        elif how == 9:
            row_3 = TABLES_3.row(LONG, unpack_mask(data[:4], len(LONG)))
            check_topk(decode(version_3(data[4:], row_3.checksum), row_3), VOCAB)
        elif how == 10:
            forged = Tables.unpack(data[:-4] + struct.pack("<I", zlib.crc32(data[:-4])))
            if forged.ranks.vocab_size == VOCAB:
                row_3 = forged.row(INPUT_IDS)
                check_topk(decode(version_3(SEED_3, row_3.checksum), row_3), VOCAB)
        elif how == 3:
            Successors.unpack(data)
        elif how == 6:
            end = sampled.HEADER.size - 4
            sampled.unpack(data[:end] + struct.pack("<I", zlib.crc32(data[:end])) + data[end + 4 :])
        elif how == 5:
            dequantise(unpack(assembled(data)))
        else:
            tables = Successors.unpack(data[:-4] + struct.pack("<I", zlib.crc32(data[:-4])))
            if tables.ranks.vocab_size == VOCAB:
                row = tables.row(INPUT_IDS)
                decode(with_checksums(SEED_2, row.checksum), row)
    except StorageError:
        pass


def seeds() -> dict[str, bytes]:
    """One good input for each reader."""
    from storage.codec.codec import pack

    return {
        "plain": b"\0" + pack(GRID),
        "ranked": b"\1" + pack(GRID, RANKS),
        "contextual": b"\2" + pack(GRID, ROW),
        "tables": b"\4" + TABLES.pack(),
        "samples": b"\6" + sampled.pack(Samples.from_drawn(IDS), VOCAB),
        "masked": b"\7" + pack_mask(MASK) + pack(GRID, TABLES.row(LONG, MASK)),
        "planes": b"\5" + bytes(range(256)) * 4,
        "roots": b"\10" + pack(ROOTS, ROW_3),
        "roots_masked": b"\11" + pack_mask(MASK) + pack(ROOTS, TABLES_3.row(LONG, MASK)),
        "tables_3": b"\12" + TABLES_3.pack(),
    }


SEED_2, SEED_3 = seeds()["contextual"][1:], seeds()["roots"][1:]

if __name__ == "__main__":
    corpus = Path(__file__).parent / "corpus"
    corpus.mkdir(exist_ok=True)
    for folder in sys.argv[1:]:  # the fuzzer writes new inputs to the first one
        if not folder.startswith("-"):
            Path(folder).mkdir(parents=True, exist_ok=True)
    for name, seed in seeds().items():
        (corpus / name).write_bytes(seed)
    atheris.Setup([*sys.argv, "-max_len=16384"], read)
    atheris.Fuzz()
