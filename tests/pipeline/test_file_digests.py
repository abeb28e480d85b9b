"""A large file is read once, and its content is never taken for another's."""

import hashlib
import os
from pathlib import Path

import pytest

from pipeline import file_digests
from pipeline.file_digests import SAMPLE, SAMPLES, digest_of, digests_of


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, and settled though it is new."""
    monkeypatch.setattr(file_digests, "LARGE", 1 << 20)
    monkeypatch.setattr(file_digests, "SETTLED", -1e9)
    path = tmp_path / "large.jsonl"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read whole."""
    found, whole = list[str](), hashlib.file_digest

    def noted(file, digest):  # type: ignore[no-untyped-def]
        found.append(Path(file.name).name)
        return whole(file, digest)

    monkeypatch.setattr(file_digests.hashlib, "file_digest", noted)
    return found


def truth(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(tmp_path: Path, large: Path, read: list[str]) -> None:
    for _ in range(3):
        assert digest_of(str(large), tmp_path / "memory") == truth(large)
    assert read == ["large.jsonl"]
    digest_of(str(large))
    assert len(read) == 2, "it was to be read whatever is known"


def test_a_small_or_young_file_is_read_each_time(
    tmp_path: Path, large: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small.jsonl"
    small.write_bytes(b"x" * 1000)
    monkeypatch.setattr(file_digests, "SETTLED", 10.0)
    for path in (small, large):
        for _ in range(2):
            assert digest_of(str(path), tmp_path / "memory") == truth(path)
    assert read == ["small.jsonl"] * 2 + ["large.jsonl"] * 2


@pytest.mark.parametrize("place", [0, 12_345, 1 << 19, (1 << 20) - 1])
def test_a_changed_file_is_read_again(
    tmp_path: Path, large: Path, read: list[str], place: int
) -> None:
    """One byte, with size and time of the content put back."""
    before = os.stat(large)
    digest_of(str(large), tmp_path / "memory")
    with open(large, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_of(str(large), tmp_path / "memory") == truth(large)
    assert len(read) == 2


def test_a_file_in_the_place_of_another_is_read(
    tmp_path: Path, large: Path, read: list[str]
) -> None:
    digest_of(str(large), tmp_path / "memory")
    other = tmp_path / "other"
    other.write_bytes(os.urandom(1 << 20))
    os.utime(other, ns=(0, os.stat(large).st_mtime_ns))
    os.replace(other, large)
    assert digest_of(str(large), tmp_path / "memory") == truth(large)
    assert len(read) == 2


def test_the_sample_tells_files_of_the_same_stamp_apart(
    tmp_path: Path, large: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file system's clock stands still."""
    monkeypatch.setattr(file_digests, "stamp", lambda path: {"bytes": 1 << 20, "ctime": 0})
    digest_of(str(large), tmp_path / "memory")
    data = bytearray(large.read_bytes())
    data[-1] ^= 1
    large.write_bytes(data)
    assert digest_of(str(large), tmp_path / "memory") == truth(large)
    assert len(read) == 2


def test_a_sample_reads_little(large: Path) -> None:
    with open(large, "ab") as file:
        file.truncate(1 << 30)  # a hole
    before = Path("/proc/self/io").read_text().split()[1]
    file_digests.sample_of(str(large))
    after = Path("/proc/self/io").read_text().split()[1]
    assert int(after) - int(before) < 2 * SAMPLES * SAMPLE


@pytest.mark.parametrize("content", [b"", b"[]", b'{"stamp": 3', b'{"sha256": "a"}', b"\xff\xfe"])
def test_a_damaged_note_is_made_again(
    tmp_path: Path, large: Path, read: list[str], content: bytes
) -> None:
    memory = tmp_path / "memory"
    digest_of(str(large), memory)
    (note,) = memory.iterdir()
    note.write_bytes(content)
    for _ in range(2):
        assert digest_of(str(large), memory) == truth(large)
    assert len(read) == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hashlib.file_digest

    def slow(file, digest):  # type: ignore[no-untyped-def]
        found = whole(file, digest)
        with open(large, "ab") as other:
            other.write(b"more")
        return found

    monkeypatch.setattr(file_digests.hashlib, "file_digest", slow)
    digest_of(str(large), tmp_path / "memory")
    monkeypatch.undo()
    assert not (tmp_path / "memory").exists()
    assert digest_of(str(large), tmp_path / "memory") == truth(large)


@pytest.fixture
def many(tmp_path: Path, large: Path) -> list[str]:
    """Small files that are as much as a large one, and a large one."""
    paths = [tmp_path / f"{number}.jsonl" for number in range(200)]
    for path in paths:
        path.write_bytes(os.urandom((1 << 20) // 200 + 1))
    return [*map(str, paths), str(large)]


def test_many_small_files_are_read_once(tmp_path: Path, many: list[str], read: list[str]) -> None:
    expected = [truth(Path(path)) for path in many]
    for _ in range(3):
        assert digests_of(many, tmp_path / "memory") == expected
    assert sorted(read) == sorted(Path(path).name for path in many)
    assert len(list((tmp_path / "memory").iterdir())) == 2
    assert digests_of(many[1:], tmp_path / "memory") == expected[1:]
    assert len(read) == 2 * len(many) - 2, "another corpus is known by itself"


@pytest.mark.parametrize("which", [0, 77, 199])
def test_one_changed_among_many_small_files(
    tmp_path: Path, many: list[str], read: list[str], which: int
) -> None:
    digests_of(many, tmp_path / "memory")
    path = Path(many[which])
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests_of(many, tmp_path / "memory") == [truth(Path(path)) for path in many]
    assert "large.jsonl" not in read[len(many) :]


def test_a_young_one_among_many_is_not_remembered(
    tmp_path: Path, many: list[str], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "SETTLED", 10.0)
    for _ in range(2):
        digests_of(many, tmp_path / "memory")
    assert len(read) == 2 * len(many)


def test_a_sample_lies_over_all_files(tmp_path: Path) -> None:
    """Its first and its last bytes, and those of most files between."""
    paths = [tmp_path / str(number) for number in range(32)]
    for path in paths:
        path.write_bytes(b"x" * SAMPLE)
    before = file_digests.sample_of(*map(str, paths))
    for path in paths:
        path.write_bytes(b"y" * SAMPLE)
        assert file_digests.sample_of(*map(str, paths)) != before
        path.write_bytes(b"x" * SAMPLE)
    (tmp_path / "empty").write_bytes(b"")
    assert file_digests.sample_of(str(tmp_path / "empty"))
