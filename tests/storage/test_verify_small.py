"""verify names every damaged file that holds no rows; each byte of them counts."""

import json
from pathlib import Path

import pytest

from storage import create_dump, verify
from storage.errors import CorruptShard, FormatVersionError
from storage.index_files import partition_index
from storage.manifest import Dump
from storage.parsing import to_json
from tests.helpers.linked import counted
from tests.helpers.records import flip_byte, make_dump, plan

TOKENIZER = {"tokenizer.json": b'{"model": "bpe"}', "added tokens.txt": b"<eos>\n"}


def with_tokenizer(path: Path, partitions: int = 1) -> Dump:
    """A finished dump with a tokenizer."""
    create_dump(path, plan(partitions=partitions), TOKENIZER)
    return make_dump(path, partitions=partitions)


def changed(file: Path, **values: object) -> None:
    """Other values in a JSON file, written as a writer does."""
    file.write_bytes(to_json({**json.loads(file.read_bytes()), **values}))


def first_fault(path: Path, partial: bool = False) -> str:
    report = verify(path, partial=partial)
    assert report.faults
    return report.faults[0]


@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        "manifest.json",
        "tokenizer/tokenizer.json",
        "tokenizer/added tokens.txt",
        "00000/complete.json",
        "00001/complete.json",
        "00000/00001.json",
        "00000/00000-*.index",
        "00001/00001-*.index",
    ],
)
def test_every_byte_of_a_small_file_is_checked(tmp_path: Path, name: str) -> None:
    with_tokenizer(tmp_path, partitions=2)
    assert verify(tmp_path).ok
    assert verify(tmp_path).notes == []
    (file,) = tmp_path.glob(name)
    data = file.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 8)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        report = verify(tmp_path)
        assert report.faults, (at, data[max(0, at - 20) : at + 20])
    file.write_bytes(data)
    assert verify(tmp_path).ok


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.json", "tokenizer/added tokens.txt", "00000/complete.json"]
)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    (fault,) = verify(tmp_path).faults
    assert fault.startswith(f"{name}: missing")


def test_a_dump_without_indexes_beside_its_shards_is_whole(tmp_path: Path) -> None:
    """They are derived: the format allows a dump without any."""
    make_dump(tmp_path)
    for file in tmp_path.glob("00000/*.index"):
        file.unlink()
    assert verify(tmp_path).ok


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_index_of_another_shard_is_named(tmp_path: Path, jobs: int) -> None:
    make_dump(tmp_path)
    first, second = sorted(tmp_path.glob("00000/*.index"))
    second.write_bytes(first.read_bytes())
    (fault,) = verify(tmp_path, jobs=jobs).faults
    assert fault.startswith(f"00000/{second.name}: it belongs to another dump")


def test_a_damaged_index_of_a_partition_is_named(tmp_path: Path) -> None:
    make_dump(tmp_path)
    partition = Dump(counted(tmp_path)).partitions[0]
    partition.join(partition.shards)
    assert verify(tmp_path).ok
    flip_byte(tmp_path / partition_index(0))
    (fault,) = verify(tmp_path).faults
    assert fault.startswith(partition_index(0))


@pytest.mark.parametrize("key", ["shards", "rows", "tokens", "documents"])
def test_complete_says_what_manifest_and_markers_say(tmp_path: Path, key: str) -> None:
    make_dump(tmp_path)
    file = tmp_path / "00000/complete.json"
    changed(file, **{key: 7})
    assert first_fault(tmp_path) == (
        "00000/complete.json: it differs from its copy in manifest.json"
    )
    if key != "documents":  # also where the manifest was changed with it
        changed(tmp_path / "manifest.json", partitions=[json.loads(file.read_bytes())])
        assert first_fault(tmp_path).startswith(f"00000/complete.json: {key}: expected ")
        (tmp_path / "manifest.json").unlink()
        assert first_fault(tmp_path, partial=True).startswith(f"00000/complete.json: {key}: ")


@pytest.mark.parametrize("key", ["rows", "tokens", "partitions"])
def test_totals_of_the_manifest_are_those_of_its_shards(tmp_path: Path, key: str) -> None:
    make_dump(tmp_path)
    changed(tmp_path / "manifest.json", **{key: [] if key == "partitions" else 7})
    assert first_fault(tmp_path).startswith("manifest.json: ")


def test_a_manifest_of_a_later_release_is_refused(tmp_path: Path) -> None:
    dump = make_dump(tmp_path)
    changed(tmp_path / "manifest.json", format_version=9)
    with pytest.raises(FormatVersionError, match=r"manifest\.json: format version 9, this release"):
        dump.manifest()
    assert "manifest.json: format version 9" in first_fault(tmp_path)
    changed(tmp_path / "manifest.json", format_version=2)
    with pytest.raises(CorruptShard, match=r"format_version: expected 1, as in plan\.json"):
        dump.manifest()


@pytest.mark.parametrize("found", [7, {"../plan.json": "0" * 64}, {"tokenizer.json": "abc"}])
def test_impossible_sha256s_of_a_tokenizer_are_refused(tmp_path: Path, found: object) -> None:
    dump = make_dump(tmp_path)
    changed(tmp_path / "manifest.json", tokenizer_sha256=found)
    with pytest.raises(CorruptShard, match=r"manifest\.json: tokenizer_sha256: expected the sha"):
        dump.manifest()


def test_a_manifest_of_an_earlier_release_verifies_as_before(tmp_path: Path) -> None:
    """Without sha256s of the tokenizer. Its files are not checked, and notes say so."""
    dump = with_tokenizer(tmp_path)
    file = tmp_path / "manifest.json"
    body = json.loads(file.read_bytes())
    assert set(body.pop("tokenizer_sha256")) == set(TOKENIZER)
    file.write_bytes(to_json(body))
    (index,) = tmp_path.glob("rows-*.index")
    index.unlink()
    dump.finish()  # again, as whoever runs a finished dump once more
    assert json.loads(file.read_bytes()) == body
    (index,) = tmp_path.glob("rows-*.index")
    assert index.name.startswith(f"rows-{dump.manifest().fingerprint[:16]}")
    report = verify(tmp_path)
    assert report.ok
    assert report.notes == [
        f"tokenizer/{name}: no manifest.json has its sha256; not checked"
        for name in sorted(TOKENIZER)
    ]
