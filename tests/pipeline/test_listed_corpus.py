"""What follows from the list of a corpus's files is what an opened corpus says."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.listed_corpus import ListedCorpus, list_of, spans_of
from pipeline.models.directory import ModelFolder
from storage.corpus_list import CorpusList
from tests.helpers.corpora import write_folder, write_texts


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Any:
    return ModelFolder(model_path).tokenizer


def listed(documents: list[int], sizes: list[int] | None = None) -> CorpusList:
    number = len(documents)
    names = [f"{at}.jsonl" for at in range(number)]
    sizes = [10] * number if sizes is None else sizes
    return CorpusList("", names, sizes, [""] * number, documents, [""] * number, True, {})


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.integers(0, 6),
    st.none() | st.integers(1, 20),
    st.data(),
)
def test_files_that_hold_documents_hold_them(
    documents: list[int], skip: int, limit: int | None, data: st.DataObject
) -> None:
    """As found by a list of the file of each document."""
    config = CorpusConfig("unused", skip=skip, limit=limit)
    known = ListedCorpus(config, None, listed(documents), "")  # type: ignore[arg-type]
    files = [file for file, number in enumerate(documents) for _ in range(number)]
    files = files[skip:][:limit]
    assert len(known) == len(files)
    spans = spans_of(documents, skip, len(files))
    assert [file for file, span in enumerate(spans) for _ in range(*span)] == files
    if files:
        first = data.draw(st.integers(0, len(files) - 1))
        stop = data.draw(st.integers(first + 1, len(files)))
        found = known.holding(first, stop)
        assert {*files[first:stop]} <= {*found}
        assert files[first] not in found or not any(documents[found.start : files[first]])
        assert found[-1] == files[stop - 1]


@pytest.mark.parametrize(
    ("files", "sizes", "lines"),
    [
        (["a/0.jsonl", "a/1.jsonl"], [10, 20], []),
        (["a/0.jsonl", "a/1.jsonl"], [10, None], []),
        (["a/0.jsonl", "a/1.jsonl"], [10, 21], ["1.jsonl: 20 bytes in the dump's list, 21 here"]),
        (["a/0.jsonl"], [10], ["1.jsonl: 20 bytes in the dump's list, not here"]),
        (
            ["a/0.jsonl", "a/1.jsonl", "a/2.jsonl"],
            [10, 20, 3],
            ["2.jsonl: not in the dump's list, here"],
        ),
        (["a/1.jsonl", "a/0.jsonl"], [20, 10], ["another order in the dump's list than here"]),
    ],
)
def test_other_names_and_sizes_are_named(
    files: list[str], sizes: list[int | None], lines: list[str]
) -> None:
    known = ListedCorpus(CorpusConfig("a"), None, listed([1, 1], [10, 20]), "")  # type: ignore[arg-type]
    assert list(known.differences(files, sizes)) == lines


def test_a_corpus_is_listed(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[list[dict[str, Any]]] = [[{"text": "a b"}, {"text": "c"}], [], [{"text": None}]]
    folder = write_folder(tmp_path / "c", rows)
    config = CorpusConfig(str(folder))
    corpus = Corpus(config, tokenizer, 100)
    found = list_of(corpus)
    assert found is not None
    assert found.paths == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert found.sizes == [path.stat().st_size for path in sorted(folder.iterdir())]
    assert found.documents == [2, 0, 1]
    assert found.samples[1] == found.samples[2] != found.samples[0]
    assert found.ids_differ
    known = ListedCorpus(config, tokenizer, found, "")
    assert known.fingerprint == corpus.fingerprint() == found.fingerprint
    assert known.is_cached


def test_ids_that_repeat_are_listed_as_such(tmp_path: Path, tokenizer: Any) -> None:
    for name, ids, differ in [("a", [1, 2], True), ("b", [1, 1], False), ("c", [1, None], False)]:
        files = [[{"text": "a", "id": each}] for each in ids]
        corpus = Corpus(CorpusConfig(str(write_folder(tmp_path / name, files))), tokenizer, 100)
        found = list_of(corpus)
        assert found is not None
        assert found.ids_differ == differ, name


def test_what_cannot_be_listed(tmp_path: Path, tokenizer: Any) -> None:
    """A single file needs no list, and JSON has no name that is not UTF-8."""
    one = write_texts(tmp_path / "one.jsonl", ["a"])
    assert list_of(Corpus(CorpusConfig(str(one)), tokenizer, 100)) is None
    folder = write_folder(tmp_path / "c", [[{"text": "a"}], [{"text": "b"}]])
    (folder / "1.jsonl").rename(str(folder / "\udcff.jsonl"))
    assert list_of(Corpus(CorpusConfig(str(folder)), tokenizer, 100)) is None
