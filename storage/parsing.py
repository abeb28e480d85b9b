"""JSON files of a dump, parsed and not trusted: limits, types, ranges, names by pattern.

A dump may come from anyone. Each check raises CorruptShard that names the file, the key, what was
expected and what was found.
"""

import json
import math
import re
from typing import Any, NoReturn

from storage.errors import CorruptShard

Json = dict[str, Any]

PLAN_BYTES, MARKER_BYTES, MANIFEST_BYTES = 16 << 20, 1 << 20, 256 << 20  # most that is read
MOST_PARTITIONS = 100_000
MOST_VOCAB = 1 << 22
MOST_K = 65_535
MOST = 1 << 53  # of any other whole number: what a JSON reader keeps exactly
MASS_BINS = 20  # bins of the histogram of kept mass, over [0, 1]

SHARD_NAME = re.compile(r"(\d{5,9})/(\d{5,9})", re.ASCII)
DATA_FILE = re.compile(r"(\d{5,9})-[0-9a-f]{1,64}\.parquet", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")


def to_json(value: Json) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def from_json(data: bytes, name: str) -> Json:
    """Parse a JSON object. Raises CorruptShard that names the file."""
    try:
        value = json.loads(data, parse_constant=not_a_number, parse_float=finite)
        if b"\\u" in data:
            to_json(value)  # half of a surrogate pair cannot be written again
    except (ValueError, RecursionError) as error:
        raise CorruptShard(
            f"{name}: not valid JSON ({error}): the file is damaged, restore it from a copy"
        ) from None
    if not isinstance(value, dict):
        raise CorruptShard(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def not_a_number(found: str) -> NoReturn:
    raise ValueError(f"{found} is not a number")


def finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else not_a_number(text)


def wrong(name: str, key: str, expected: str, found: object) -> CorruptShard:
    shown = repr(found)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    return CorruptShard(
        f"{name}: {key}: expected {expected}, found {shown}: restore the file from a copy"
    )


def whole(values: Json, key: str, name: str, low: int = 0, high: int = MOST) -> int:
    """A whole number from low to high."""
    found = values.get(key)
    if type(found) is not int or not low <= found <= high:
        raise wrong(name, key, f"a whole number from {low} to {high}", found)
    return found


def number(values: Json, key: str, name: str) -> float:
    """A finite number."""
    found = values.get(key)
    if type(found) not in (int, float) or abs(found) > MOST:  # type: ignore[arg-type]
        raise wrong(name, key, "a number", found)
    return float(found)  # type: ignore[arg-type]


def matched(
    values: Json, key: str, name: str, pattern: re.Pattern[str], like: str
) -> re.Match[str]:
    """A text of this pattern; `like` is an example."""
    found = values.get(key)
    match = pattern.fullmatch(found) if isinstance(found, str) else None
    if match is None:
        raise wrong(name, key, f"a name such as {like}", found)
    return match


def objects(values: Json, key: str, name: str) -> list[Json]:
    """A list of JSON objects."""
    found = values.get(key)
    if not isinstance(found, list) or not all(isinstance(value, dict) for value in found):
        raise wrong(name, key, "a list of objects", found)
    return found


def check_marker(marker: Json, shard: str, masked: bool = False, shared: bool = False) -> None:
    """The marker of a shard such as "00003/00007"; `masked` rows may have fewer positions, rows
    that are decoded with `shared` tables need their sha256."""
    name = f"{shard}.json"
    index = shard.split("/")[1]
    file = matched(marker, "file", name, DATA_FILE, f"{index}-0123456789ab.parquet")
    if file[1] != index:
        raise wrong(name, "file", f"a data file of shard {index}", marker["file"])
    matched(marker, "sha256", name, SHA256, "64 hexadecimal digits")
    if marker.get("footer_crc32") is not None:
        whole(marker, "footer_crc32", name, 0, (1 << 32) - 1)
    size = whole(marker, "bytes", name)
    rows = whole(marker, "rows", name, 0, size)  # a row takes more than a byte
    if shared and rows:
        matched(marker, "tables", name, SHA256, "64 hexadecimal digits")
    tokens = whole(marker, "tokens", name, 2 * rows if masked else rows)
    positions = whole(marker, "positions", name)
    if masked:
        whole(marker, "positions", name, rows, tokens - rows)
    elif positions != tokens - rows:
        raise wrong(name, "positions", f"{tokens - rows}, the tokens less the rows", positions)
    whole(marker, "entries", name, 0, MOST_K * positions)
    for key in ("sampled_ids", "sample_bytes", "documents"):
        if key in marker:
            whole(marker, key, name)
    for key in ("mass", "kl_sum", "kl_max"):
        number(marker, key, name)
    bins = marker.get("mass_histogram")
    if not isinstance(bins, list) or len(bins) != MASS_BINS or not all(map(is_count, bins)):
        raise wrong(name, "mass_histogram", f"a list of {MASS_BINS} whole numbers", bins)
    if sum(bins) != positions:
        raise wrong(name, "mass_histogram", f"numbers that add up to {positions}", bins)
    cursor = marker.get("cursor")
    if not isinstance(cursor, dict) or not all(map(is_count, cursor.values())):
        raise wrong(name, "cursor", "an object of whole numbers", cursor)


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST


def check_summary(summary: Json, name: str) -> None:
    """complete.json, or its copy in the manifest."""
    for key in ("shards", "rows", "tokens"):
        whole(summary, key, name)


def check_names(names: list[Any], partitions: int) -> None:
    """The shards of a manifest: in order, none left out within a partition."""
    expected: dict[int, int] = {}
    last = -1
    for found in names:
        match = SHARD_NAME.fullmatch(found) if isinstance(found, str) else None
        partition = int(match[1]) if match else -1
        index = expected.get(partition, 0)
        if not last <= partition < partitions or found != f"{partition:05d}/{index:05d}":
            raise wrong("manifest.json", "shards", "shards in order, such as 00003/00007", found)
        last, expected[partition] = partition, index + 1
