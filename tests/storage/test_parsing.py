"""Plan, markers and manifest are parsed, not trusted."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from storage import CorruptShard, Dump, IncompleteDump, LogitDataset, create_dump, verify
from storage.__main__ import main
from storage.manifest import Shard
from storage.parsing import from_json, to_json
from tests.helpers.forged import data_file, read_json, rewrite, seal
from tests.helpers.records import TARGETS, make_dump, plan

MARKER = "00000/00000.json"


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"x": "\\ud800"}',
        b'{"x": "\xff"}',
        b'{"x": ' + b"9" * 100_000 + b"}",
        b'{"x": NaN}',
        b'{"x": -Infinity}',
        b'{"x": 1e400}',
        b"[]",
        b"",
        b"{",
    ],
)
def test_what_is_no_json_object_names_the_file(data: bytes) -> None:
    with pytest.raises(CorruptShard, match=r"^plan\.json: "):
        from_json(data, "plan.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": -3},
        {"rows": 2**70},
        {"rows": 3.0},
        {"tokens": 0},
        {"positions": 5},
        {"entries": 10**12},
        {"mass": "x"},
        {"mass": None},
        {"kl_max": []},
        {"mass_histogram": [10**9] + [0] * 19},
        {"mass_histogram": 5},
        {"documents": "x"},
        {"footer_crc32": -1},
        {"cursor": {"document": -5}},
        {"cursor": {"document": "x"}},
        {"cursor": 5},
        {"sha256": "../elsewhere/private"},
        {"sha256": "/" + "0" * 63},
        {"file": 5},
        {"file": "00001-0123456789ab.parquet"},
        {"file": "../../private/00000-0123456789ab.parquet"},
        {"file": "/etc/passwd"},
        {"file": "00000-0123456789ab.parquet/../../x"},
    ],
)
def test_a_marker_out_of_range_names_file_and_key(dump: Path, changes: dict[str, Any]) -> None:
    (key,) = changes
    seal(dump, marker=changes)
    with pytest.raises(CorruptShard, match=rf"00000/00000\.json: {key}: expected|: positions: exp"):
        LogitDataset(dump)
    (dump / "manifest.json").unlink()
    with pytest.raises(CorruptShard, match=r"00000/00000\.json"):
        LogitDataset(dump, partial=True)
    for command in (["inspect"], ["verify", "--partial"], ["gc", "--delete", "--older-than=-1"]):
        assert main([*command[:1], str(dump), *command[1:]]) == 4
    assert data_of(dump), "gc removed committed data"


@pytest.mark.parametrize("positions", [0, 2, 60])
def test_masked_rows_have_a_position_each_and_none_for_a_first_token(
    tmp_path: Path, positions: int
) -> None:
    make_dump(tmp_path, shards=1, rows=3, targets=TARGETS)
    assert read_json(tmp_path / MARKER)["positions"] < 57
    seal(tmp_path, marker={"positions": positions})
    with pytest.raises(CorruptShard, match=r"positions: expected a whole number from 3 to 57"):
        LogitDataset(tmp_path)
    seal(tmp_path, marker={"positions": 3, "tokens": 5})
    with pytest.raises(CorruptShard, match=r"tokens: expected a whole number from 6 to"):
        LogitDataset(tmp_path)


def data_of(dump: Path) -> list[Path]:
    return list(dump.glob("00000/*.parquet"))


KEYS = "file sha256 bytes rows tokens positions entries mass mass_histogram kl_sum kl_max cursor"


@pytest.mark.parametrize("key", KEYS.split())
def test_a_marker_without_a_key_names_it(dump: Path, key: str) -> None:
    marker = read_json(dump / MARKER)
    del marker[key]
    with pytest.raises(CorruptShard, match=rf"00000/00000\.json: {key}: .* found None"):
        Shard("00000/00000", marker)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": 5},
        {"shards": [5]},
        {"shards": [{}]},
        {"shards": [{"name": "../../private/00000"}]},
        {"shards": [{"name": "00001/00000"}]},
        {"plan_sha256": 5},
        {"partitions": [{"rows": "x"}]},
        {"partitions": None},
    ],
)
def test_a_manifest_that_lies_is_named(dump: Path, changes: dict[str, Any]) -> None:
    seal(dump, manifest=changes)
    with pytest.raises(CorruptShard, match=r"manifest\.json"):
        LogitDataset(dump)
    assert main(["verify", str(dump)]) == 4
    assert main(["inspect", str(dump)]) == 4


def test_shards_of_a_manifest_are_in_order(dump: Path) -> None:
    entry = read_json(dump / "manifest.json")["shards"][0]
    seal(dump, manifest={"shards": [entry, entry]})
    with pytest.raises(CorruptShard, match="shards in order"):
        LogitDataset(dump)


def test_a_partition_that_lies_is_named(dump: Path) -> None:
    (dump / "manifest.json").unlink()
    for data in (b"{}", b'{"rows": 1, "tokens": 1, "shards": -1}', b"[]", b""):
        (dump / "00000/complete.json").write_bytes(data)
        with pytest.raises(CorruptShard, match=r"00000/complete\.json"):
            Dump(dump).finish()


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", MARKER, "data"])
def test_only_regular_files_are_opened(dump: Path, name: str) -> None:
    """Not a pipe, which would wait for ever, nor a device, nor a link that leaves the dump."""
    file = data_file(dump) if name == "data" else dump / name
    content = file.read_bytes()
    elsewhere = dump.parent / "elsewhere"
    elsewhere.write_bytes(content)

    def read() -> None:
        if name == MARKER:
            Dump(dump).shards()
        list(LogitDataset(dump))

    for make in (
        lambda: os.mkfifo(file),
        lambda: file.symlink_to("/dev/zero"),
        lambda: file.symlink_to(elsewhere),
        lambda: file.mkdir(),
    ):
        file.unlink(missing_ok=True)
        make()
        with pytest.raises(CorruptShard, match=file.name):
            read()
        assert main(["verify", str(dump)]) == 4
    file.rmdir()
    inside = dump / "a-copy"
    inside.write_bytes(content)
    file.symlink_to(inside)
    read()
    assert verify(dump).ok


def test_the_layout_of_a_hub_cache_is_read(dump: Path) -> None:
    """snapshots/REVISION holds links to blobs."""
    cache = dump.parent / "cache"
    snapshot, blobs = cache / "snapshots" / "main", cache / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(dump.rglob("*"))):
        if file.is_file():
            shutil.copy(file, blobs / str(number))
            link = snapshot / file.relative_to(dump)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blobs / str(number))
    assert verify(snapshot).ok
    assert len(list(LogitDataset(snapshot))) == 3


def test_a_json_file_too_large_is_not_read(dump: Path) -> None:
    with (dump / MARKER).open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(CorruptShard, match="expected at most 1,048,576 bytes"):
        Dump(dump).shards()


def test_what_others_put_into_plan_and_marker_stays(dump: Path) -> None:
    """Keys that storage does not use are not its business."""
    rewrite(dump, plan={"note": [1.5, {"a": None}]}, marker={"skipped": "x", "documents": 3})
    assert LogitDataset(dump).plan["note"] == [1.5, {"a": None}]
    assert verify(dump).ok
    assert to_json(json.loads(to_json({"ä": 1}))) == to_json({"ä": 1})


def test_a_plan_that_is_refused_leaves_no_tokenizer_files(dump: Path) -> None:
    with pytest.raises(Exception, match="another plan"):
        create_dump(dump, plan(k=9), {"tokenizer.json": b"theirs"})
    assert not (dump / "tokenizer").exists()
    create_dump(dump, plan(), {"tokenizer.json": b"ours"})
    create_dump(dump, plan(), {"tokenizer.json": b"late"})
    assert (dump / "tokenizer/tokenizer.json").read_bytes() == b"ours"
    with pytest.raises(IncompleteDump, match="numbered from 0"):
        Dump(dump).partition(1)
