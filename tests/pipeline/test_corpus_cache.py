"""The cache goes by content: it cannot hold another file's documents, nor half of them."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import fsspec
import pytest

from pipeline import corpus_cache
from pipeline.corpus_cache import cached_documents, local_copy, rows_of_files
from pipeline.corpus_readers import Source
from pipeline.errors import ConfigError, FailedError
from tests.helpers.corpora import write_jsonl, write_texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "corpora"


def texts_of(*files: Path) -> list[str]:
    return list(cached_documents(sources(*files))[0]["text"])


def sources(*files: Path, column: str = "text", chat: bool = False) -> list[Source]:
    return [Source(str(file), str(file), column, chat) for file in files]


def test_the_same_time_and_size_are_not_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for word in ["older", "newer", "older"]:
        write_texts(path, [word])
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert texts_of(path) == [word]


def test_files_are_read_in_their_order(tmp_path: Path) -> None:
    one, two = write_texts(tmp_path / "1.jsonl", ["a"]), write_texts(tmp_path / "2.jsonl", ["b"])
    assert texts_of(one, two) == ["a", "b"]
    assert texts_of(two, one) == ["b", "a"]


def test_another_column_or_format_is_another_entry(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "body": "b"}])
    assert texts_of(path) == ["a"]
    assert list(cached_documents(sources(path, column="body"))[0]["body"]) == ["b"]
    assert list(cached_documents(sources(path, column="body", chat=True))[0]["body"]) == ['"b"']
    (tmp_path / "a.txt").write_bytes(path.read_bytes())
    assert texts_of(tmp_path / "a.txt") == [path.read_text()]


def test_the_second_time_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write_texts(tmp_path / "a.jsonl", ["a"])
    assert texts_of(path) == ["a"]
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(corpus_cache, "build", None)
    assert texts_of(path) == ["a"]
    assert texts_of(path.rename(tmp_path / "b.jsonl")) == ["a"]


def test_many_documents_are_written_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_cache, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(corpus_cache, "BATCH_BYTES", 60)
    texts = [str(number) * (number % 20) for number in range(100)]
    found, _ = cached_documents(sources(write_texts(tmp_path / "a.jsonl", texts)))
    assert found["text"] == texts
    assert len(found.data["text"].chunks) > 15


def test_the_documents_of_each_file_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of empty files, and where a batch holds the documents of several."""
    monkeypatch.setattr(corpus_cache, "BATCH_DOCUMENTS", 4)
    for counts in ([3, 0, 6, 1], [0, 0], [0, 5]):
        paths = [
            write_texts(tmp_path / f"{at}.jsonl", ["a"] * each) for at, each in enumerate(counts)
        ]
        found, digests = cached_documents(sources(*paths))
        assert len(found) == sum(counts)
        assert rows_of_files(sources(*paths), digests) == counts


def test_writers_at_once_agree(tmp_path: Path, cache: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", ["a"] * 500)
    with ThreadPoolExecutor(4) as pool:
        assert all(texts == ["a"] * 500 for texts in pool.map(texts_of, [path] * 8))
    assert len(list(cache.iterdir())) == 1


def test_bad_files_leave_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(ConfigError, match="line 2"):
        texts_of(path)
    assert list(cache.iterdir()) == []


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write_texts(tmp_path / "a.jsonl", ["a"])
    batches = corpus_cache.batches

    def growing(documents, size_of):  # type: ignore[no-untyped-def]
        yield from batches(documents, size_of)
        write_texts(path, ["a", "b"])

    monkeypatch.setattr(corpus_cache, "batches", growing)
    with pytest.raises(ConfigError, match=r"a\.jsonl: changed while it was read"):
        texts_of(path)
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_an_outside_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_cache.os, "fsync", full)
    with pytest.raises(FailedError, match=r"corpora: .*No space left"):
        texts_of(write_texts(tmp_path / "a.jsonl", ["a"]))
    assert list(cache.iterdir()) == []


def test_a_copy_without_a_checksum_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    name = "memory://corpus/a.jsonl"
    for content in [b"older", b"newer"]:
        fs.pipe(name, content)
        assert Path(local_copy(name)).read_bytes() == content
    info = {**fs.info(name), "ETag": '"1"'}
    monkeypatch.setattr(type(fs), "info", lambda self, path, **_: info)
    first = local_copy(name)
    monkeypatch.setattr(type(fs), "get_file", None)
    assert local_copy(name) == first
