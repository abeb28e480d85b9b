"""The law of bench_corpora.py: documents are read once, and opening costs the same in any store."""

import importlib
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline import file_digests
from pipeline.token_store import Part
from tests.helpers.models import tiny_tokenizer
from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "scripts" / "benchmarks"))
bench: Any = importlib.import_module("bench_corpora")

SAMPLED = 16  # documents whose rendering a run records


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(("files", "documents"), [(1, 50), (40, 50), (40, 500)])
def test_the_first_start_reads_each_document_once_and_the_second_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, documents: int
) -> None:
    monkeypatch.setattr(file_digests, "LARGE", 1)
    monkeypatch.setattr(file_digests, "SETTLED", -1e9)
    whole, digest = list[str](), file_digests.hashlib.file_digest

    def noted(file: Any, name: str) -> Any:
        whole.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(file_digests.hashlib, "file_digest", noted)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    path = bench.write_corpus(tmp_path / "corpus", files, documents)
    first, before = bench.start(path, tokenizer)
    assert (first.documents, first.opened) == (documents + SAMPLED, 1)
    assert len(whole) == len(set(whole)) == files
    second, after = bench.start(path, tokenizer)
    assert (second.documents, second.opened, len(whole)) == (0, 0, files)
    assert [one.input_ids.tolist() for one in after] == [one.input_ids.tolist() for one in before]


def test_opening_reads_the_same_in_any_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but store.json, which says of each part how many sequences it holds."""
    opened, real = list[str](), Part.open.__func__  # type: ignore[attr-defined]

    def noted(kind: Any, path: Path, schema: Any = None) -> Any:
        opened.append(path.name)
        return real(kind, path, schema)

    for sequences in (30, 3000):
        folder = bench.write_store(tmp_path / str(sequences), sequences, 3)
        with monkeypatch.context() as patch:
            patch.setattr(Part, "open", classmethod(noted))
            patch.setattr(bench, "ITEMS", 1)
            found = bench.item(folder)
            assert (found["sequences"], found["tokens"]) == (sequences, 20 * sequences)
            assert len(opened) == 1  # of the one item that was asked for
            patch.setattr(bench, "ITEMS", sequences)
            opened.clear()
            bench.item(folder)
            assert sorted(opened) == ["0.arrow", "1.arrow", "2.arrow"]
        opened.clear()
