"""Fuzz whole dumps: plan, manifest, markers, index, footers, columns and payloads, each sealed.

    make fuzz FUZZ_SECONDS=600

Each case takes a good dump, changes one to three parts of it, seals it (hashes, sizes, CRCs) and
reads it in every way. Memory is limited by the operating system. A reader must return rows or
raise StorageError; whatever else happens ends the fuzzer with the seed that shows it.
"""

import argparse
import hashlib
import resource
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from storage import LogitDataset, StorageError, index_files, row_head, verify
from storage.codec import samples as sampled
from storage.codec.frames import HEADER, Header, Planes, deflate, join, split_planes
from storage.codec.v2_tables import PARTS
from storage.gc import leftovers
from storage.index import Index
from storage.index_files import dump_index
from storage.inspect import describe, describe_row
from storage.manifest import Dump
from storage.parsing import to_json
from storage.scan import index_dump
from tests.helpers.forged import (
    SHAPES,
    as_before,
    data_file,
    read_json,
    rewrite,
    seal,
    seal_index,
    with_column,
    zeros,
)
from tests.helpers.records import TARGETS, VOCAB, make_dump

LIMIT = 512 << 20  # bytes of memory on top of what the imports take
KINDS: list[dict[str, Any]] = [
    {"codec": "v1", "k": 8},
    {"codec": "v2", "k": 8},
    {"codec": "v1", "k": 8, "samples": 5},
    {"codec": "v2", "k": 0, "samples": 5},
    {"codec": "v1", "k": 8, "samples": 5, "targets": TARGETS},
    {"codec": "v2", "k": 8, "targets": TARGETS},
    {"codec": "v3", "k": 8},
    {"codec": "v3", "k": 8, "samples": 5, "targets": TARGETS},
]
NUMBERS = [-1, 0, 1, 2, 7, 19, 20, 255, 256, 299, 300, 301, 65535, 65536, 2**20, 2**24, 2**31 - 1,
           2**31, 2**32 - 1, 2**53, 2**63, 2**70, 10**30]  # fmt: skip
VALUES = [
    None,
    True,
    "",
    "x",
    "../x",
    "\x1b[2J",
    "\ud800",
    [],
    {},
    [1],
    {"a": 1},
    0.5,
    1e308,
    *NUMBERS,
]
Random = np.random.Generator
PEAK = "MiB at the peak"


def pick(rng: Random, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def mutate_json(rng: Random, value: Any, depth: int = 0) -> Any:
    """The same JSON with one value, key or entry changed, somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = pick(rng, sorted(value))
        how = rng.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.15:
            return {**value, pick(rng, ["x", "name", "file"]): pick(rng, VALUES)}
        return {**value, key: mutate_json(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = int(rng.integers(len(value)))
        middle = [] if rng.random() < 0.1 else [mutate_json(rng, value[at], depth + 1)]
        middle *= int(rng.integers(1, 3))
        return [*value[:at], *middle, *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + pick(rng, [-1, 1, 8, -300, 1 << 16])
    return pick(rng, VALUES)


def damage(rng: Random, data: bytes) -> bytes:
    """A few bytes changed, inserted, removed."""
    bad = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not bad:
            break
        at, how = int(rng.integers(len(bad))), rng.random()
        if how < 0.6:
            bad[at] = pick(rng, [0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
        elif how < 0.8:
            bad[at:at] = rng.bytes(int(rng.integers(1, 5)))
        else:
            del bad[at : at + int(rng.integers(1, 9))]
    return bytes(bad)


def plan(rng: Random, path: Path) -> None:
    whole = mutate_json(rng, read_json(path / "plan.json"))
    if rng.random() < 0.3:
        (path / "plan.json").write_bytes(damage(rng, (path / "plan.json").read_bytes()))
        return
    try:
        rewrite(path, plan=whole if isinstance(whole, dict) else {})
    except UnicodeEncodeError:
        (path / "plan.json").write_text('{"x": "\\ud800"}')


def marker(rng: Random, path: Path) -> None:
    name = pick(rng, ["00000/00000.json", "00000/complete.json", "manifest.json"])
    there = read_json(path / name)
    if rng.random() < 0.3:
        (path / name).write_bytes(damage(rng, (path / name).read_bytes()))
        return
    changed = mutate_json(rng, there)
    try:
        data = to_json(changed)
    except UnicodeEncodeError:
        return
    (path / name).write_bytes(data)
    if name == "00000/00000.json" and isinstance(changed, dict) and rng.random() < 0.9:
        whole = read_json(path / "manifest.json")
        whole["shards"] = [{"name": "00000/00000", **changed}]
        (path / "manifest.json").write_bytes(to_json(whole))


def footer(rng: Random, path: Path) -> None:
    """Bytes of the Parquet footer, or of anything else in the file."""
    file = data_file(path)
    data = file.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - length if rng.random() < 0.7 else 4
    middle = damage(rng, data[start:-8])
    end = len(data) - 8 - start if rng.random() < 0.3 else len(middle)
    size = length + len(middle) - (len(data) - 8 - start) if end == len(middle) else length
    file.write_bytes(data[:start] + middle[:end] + struct.pack("<I", max(size, 0)) + data[-4:])
    seal(path)


def shape(rng: Random, path: Path) -> None:
    change, options = SHAPES[pick(rng, sorted(SHAPES))]
    rewrite(path, change, **options)


def bomb(rng: Random, path: Path) -> None:
    """A column that is small on disk."""
    name, size = pick(rng, ["doc_id", "payload", "input_ids"]), int(rng.integers(1, 30)) << 20
    options = {"use_dictionary": bool(rng.random() < 0.5)}
    if name == "input_ids":
        change = with_column(name, lambda column: zeros(column, size // 4))
    else:
        kind = pa.string() if name == "doc_id" else pa.binary()
        change = with_column(name, lambda column: pa.array([bytes(size)] * len(column), kind))
    rewrite(path, change, **options)


def metadata(rng: Random, path: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetFile(data_file(path)) as file:
        kept = dict(file.metadata.metadata)
    key = pick(rng, sorted(kept))
    rewrite(path, metadata={key: pick(rng, [None, b"", b"x", b"\x1b", damage(rng, kept[key])])})


def with_header(data: bytes, rng: Random) -> bytes:
    """A payload whose header has other numbers, with its checksums right."""
    fields = list(HEADER.unpack(data[: HEADER.size]))
    at = int(rng.integers(1, len(fields) - 1))
    fields[at] = pick(rng, [1 / 16, 1e-300, 7.9]) if at == 7 else pick(rng, NUMBERS[1:])
    if at < 7:
        fields[at] %= 6
    elif at != 7:
        fields[at] %= 1 << (64 if at == 10 else 32)
    head = HEADER.pack(*fields)[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + data[HEADER.size :]


def assembled(data: bytes, rng: Random) -> bytes:
    """A version 1 payload of any planes, for the tables of the first one."""
    *_, needs, _ = HEADER.unpack(data[: HEADER.size])
    positions = int(pick(rng, [19, 19, 19, 20, 4096, 1 << 20]))
    k = int(pick(rng, [0, 1, 8, 8, 9, 300, 32768]))
    entries = positions * k
    if entries > 1 << 26:
        return data
    sizes = (entries, entries, positions, positions)
    planes = [split_planes(np.array([k]), 2)]
    for size in sizes:
        width = int(rng.integers(0, 5))
        values = rng.bytes(size) if size < 1 << 12 and rng.random() < 0.5 else bytes(size)
        planes.append([values] * width)
    header = Header(1, Planes(0, *map(len, planes[1:])), 1 / 16, VOCAB, positions, entries, needs)
    return join(header.pack(), deflate(planes))


def planes_damaged(data: bytes, rng: Random) -> bytes:
    """One frame inflated, changed and deflated again; sizes and checksums right."""
    head, size, widths = data[: HEADER.size], HEADER.size, data[6:10]
    number = 2 + sum(widths) + (2 if data[4] == 2 else 0)
    lengths = struct.unpack_from(f"<{number}I", data, size)
    parts, at = [], size + 4 * number
    for length in lengths:
        parts.append(data[at : at + length])
        at += length
    which = int(rng.integers(number))
    framed = which < 2 + sum(widths) and data[4] != 3
    raw = zstandard.ZstdDecompressor().decompress(parts[which]) if framed else parts[which]
    changed = bytearray(damage(rng, raw).ljust(len(raw), b"\0")[: len(raw)])
    parts[which] = deflate([[bytes(changed)]])[0] if framed else bytes(changed)
    return join(head, parts)


def mend_roots(data: bytes) -> bytes:
    """Version 3's checksum, of the header and the second part, made right."""
    if len(data) < HEADER.size + 12:
        return data
    (first,) = struct.unpack_from("<I", data, HEADER.size)
    coded = data[HEADER.size + 8 :][min(first, len(data)) : -4]
    return data[:-4] + struct.pack("<I", zlib.crc32(coded, zlib.crc32(data[: HEADER.size])))


def payload(rng: Random, path: Path) -> None:
    row = int(rng.integers(3))
    how = pick(rng, [with_header, assembled, planes_damaged, lambda d, r: damage(r, d)])

    def change(column: pa.ChunkedArray) -> pa.Array:
        values = column.to_pylist()
        data = how(values[row], rng)
        if data[4:5] == b"\2" and len(data) > HEADER.size + 4:
            data = data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))
        values[row] = mend_roots(data) if data[4:5] == b"\3" else data
        return pa.array(values, pa.binary())

    rewrite(path, with_column("payload", change))


def column(name: str, mend: Callable[[bytes], bytes]) -> Callable[[Random, Path], None]:
    """Damage the first value of a column and mend its checksum."""

    def apply(rng: Random, path: Path) -> None:
        def change(values: pa.ChunkedArray) -> pa.Array:
            found = values.to_pylist()
            return pa.array([mend(damage(rng, found[0])), *found[1:]], pa.binary())

        rewrite(path, with_column(name, change))

    return apply


def mask(rng: Random, path: Path) -> None:
    """Another mask, in the column alone: a byte or two, a bit moved, or another length."""

    def change(values: pa.ChunkedArray) -> pa.Array:
        found = values.to_pylist()
        row = int(rng.integers(len(found)))
        bits = np.unpackbits(np.frombuffer(found[row], np.uint8), bitorder="little")
        moved = np.packbits(np.roll(bits, int(rng.integers(1, 9))), bitorder="little").tobytes()
        found[row] = pick(rng, [damage(rng, found[row]), moved, b"", bytes(3), b"\xff" * 4000])
        return pa.array(found, pa.binary())

    rewrite(path, with_column("targets", change))


def mend_table(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def mend_samples(data: bytes) -> bytes:
    end = sampled.HEADER.size - 4
    return data[:end] + struct.pack("<I", zlib.crc32(data[:end])) + data[end + 4 :]


def table_bomb(rng: Random, path: Path) -> None:
    """Tables that claim many successors."""
    total = int(pick(rng, [1 << 16, 1 << 20, 1 << 24]))

    def change(values: pa.ChunkedArray) -> pa.Array:
        found = values.to_pylist()
        data = bytearray(found[0])
        head = list(PARTS.unpack(data[: PARTS.size]))
        head[int(rng.integers(1, 4))] = total
        data[: PARTS.size] = PARTS.pack(*head)
        return pa.array([mend_table(bytes(data)), *found[1:]], pa.binary())

    rewrite(path, with_column("successors", change))


def shared_tables(rng: Random, path: Path) -> None:
    """Tables of the dump with some bytes changed; their checksum and hash right, or not."""
    (file,) = path.glob("tables-*.bin")
    bad = bytearray(file.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        bad[int(rng.integers(len(bad)))] = int(pick(rng, [0, 1, 255, int(rng.integers(256))]))
    cut = int(rng.integers(len(bad))) if rng.random() < 0.2 else len(bad)
    data = mend_table(bytes(bad[:cut])) if rng.random() < 0.8 else bytes(bad[:cut])
    if rng.random() < 0.1:
        file.write_bytes(data)
        return
    sha256 = hashlib.sha256(data).hexdigest()
    (path / f"tables-{sha256[:16]}.bin").write_bytes(data)
    file.unlink()
    rewrite(path, None, {b"tables": sha256.encode()})
    seal(path, marker={"tables": sha256})


def other_tables(rng: Random, path: Path) -> None:
    """A marker that names other tables, or none."""
    seal(path, marker={"tables": pick(rng, [*VALUES, "0" * 64, "f" * 64, "../" * 21 + "x"])})


def places(rng: Random, path: Path) -> None:
    """The index of rows: numbers and bytes changed, checksums right, and bounds not."""
    file, data = an_index(path)
    bad = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = 4 * int(rng.integers(2, len(bad) // 4))
        kind, most = (
            ("<Q", 1 << 64) if rng.random() < 0.5 and at + 8 <= len(bad) else ("<I", 1 << 32)
        )
        (there,) = struct.unpack_from(kind, bad, at)
        value = there + int(rng.integers(-9, 9)) if rng.random() < 0.5 else pick(rng, NUMBERS)
        struct.pack_into(kind, bad, at, value % most)
    if rng.random() < 0.2:
        bad = bytearray(damage(rng, bytes(bad)))
    file.write_bytes(bytes(bad) if rng.random() < 0.1 else seal_index(bytes(bad)))


def heads(rng: Random, path: Path) -> None:
    """The heads in the index of a dump of before, each with its checksum right."""
    as_before(path)
    file, data = an_index(path)
    index = Index(data, file.name, Dump(path).manifest().fingerprint, Dump(path).plan_sha256)
    shard, bad = data_file(path).read_bytes(), bytearray(data)
    for entry in index.entries:
        at, size = index.heads_at + int(entry["head_offset"]), int(entry["head_size"])
        body = bytearray(bad[at : at + size - 4])
        for _ in range(int(rng.integers(0, 3))):
            place = int(rng.integers(4, len(body)))
            width = "<I" if rng.random() < 0.5 and place + 4 <= len(body) else "<B"
            top = 32 if width == "<I" else 8
            struct.pack_into(width, body, place, pick(rng, NUMBERS) % (1 << top))
        payload = shard[int(entry["offset"]) :][: int(entry["size"])]
        crc = row_head.checksum(bytes(body), b"", payload)
        bad[at : at + size] = bytes(body) + struct.pack("<I", crc)
    file.write_bytes(seal_index(bytes(bad)))


def an_index(path: Path) -> tuple[Path, bytes]:
    """The index of a dump and its name, made where the dump has changed since."""
    dump = Dump(path)
    manifest = dump.manifest()
    file = path / dump_index(manifest.fingerprint)
    return file, file.read_bytes() if file.exists() else bytes(index_dump(dump, manifest).data)


PARTS_OF_ANY = [
    places,
    places,
    heads,
    plan,
    marker,
    marker,
    footer,
    footer,
    shape,
    bomb,
    metadata,
    payload,
    payload,
    payload,
]


def mutations(
    codec: str, samples: int = 0, targets: Any = None, **_: Any
) -> list[Callable[[Random, Path], None]]:
    more = [column("successors", mend_table), table_bomb] if codec == "v2" else []
    more += [shared_tables, shared_tables, other_tables] if codec == "v3" else []
    more += [column("samples", mend_samples)] if samples else []
    return [*PARTS_OF_ANY, *more, *([mask, mask] if targets else [])]


def read(path: Path) -> str:
    """Read the dump in every way; the kind of the last error, or what verify said."""
    outcome = "read"

    def rows(**options: Any) -> None:
        dataset = LogitDataset(path, **options)
        list(describe(dataset))
        dataset.lengths  # noqa: B018
        dataset.target_counts  # noqa: B018
        for record in dataset:
            assert len(record.topk) == len(record.positions)
            assert np.isfinite(record.topk.logprobs).all()
            assert not np.isnan(record.topk.tail_logprob).any()
            assert 0 <= record.topk.ids.min(initial=0) <= record.topk.ids.max(initial=0) < 1 << 22
            list(describe_row(record, str))

    def alone() -> None:
        dataset = LogitDataset(path)
        for number in range(min(len(dataset), 9)):
            record = dataset[number]
            assert np.isfinite(record.topk.logprobs).all()
            assert dataset.lengths[number] == len(record.input_ids)
            if record.targets is not None:
                assert dataset.target_counts[number] == len(record.positions)

    def finish() -> None:
        Dump(path).finish()

    for way in (rows, alone, lambda: rows(samples=False), lambda: rows(partial=True),
                lambda: leftovers(path, -1), finish):  # fmt: skip
        try:
            way()
        except StorageError as error:
            outcome = kind_of(error)
    try:
        report = verify(path)
        outcome = "read" if report.ok and outcome == "read" else outcome
    except StorageError as error:
        outcome = kind_of(error)
    return outcome


def kind_of(error: StorageError) -> str:
    """Its type, and what the gate of the reader caught if no check had spoken before."""
    cause = f" from {type(error.__cause__).__name__}" if error.__cause__ else ""
    return f"{type(error).__name__}{cause}"


def fuzz(seconds: float, seed: int, cases: int = 1 << 60, limit: bool = True) -> Counter[str]:
    """Outcomes of the cases that fit into the time; `limit` limits the memory of this process."""
    found: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        index_files.user_cache = lambda: Path(folder) / "cache"
        for number, shape in enumerate(KINDS):
            good = Path(folder) / str(number)
            make_dump(good, shards=1, rows=3, **shape)
            read(good)  # compiles, loads
        if limit:
            limit_memory()
        for case in range(seed, seed + cases):
            if time.monotonic() > deadline:
                break
            rng = np.random.default_rng(case)
            kind = case % len(KINDS)
            path = Path(folder) / "case"
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(Path(folder) / str(kind), path)
            for _ in range(int(rng.integers(1, 4))):
                change = pick(rng, mutations(**KINDS[kind]))
                try:
                    change(rng, path)
                except Exception:  # what the change before left cannot be changed again
                    break
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
            try:
                found[read(path)] += 1
            except Exception:
                print(f"case {case}: not a StorageError", file=sys.stderr)
                raise
            found[PEAK] = max(found[PEAK], memory("VmHWM") - before)
    return found


def memory(line: str) -> int:
    """MiB of this process: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) >> 10


def limit_memory() -> None:
    """No more than LIMIT bytes on top of what this process has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = fuzz(given.seconds, given.seed)
    peak = found.pop(PEAK)
    print(f"{sum(found.values()):,} dumps: {dict(found)}; reading one took {peak} MiB at most")


if __name__ == "__main__":
    main()
