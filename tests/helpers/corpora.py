"""Small corpora on disk for the tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import TEXTS


def write_jsonl(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def write_texts(path: Path, texts: list[str]) -> Path:
    return write_jsonl(path, [{"text": text} for text in texts])


def write_folder(folder: Path, files: list[list[dict[str, Any]]]) -> Path:
    """A corpus of several files, in the order of their names."""
    folder.mkdir()
    for number, documents in enumerate(files):
        write_jsonl(folder / f"{number}.jsonl", documents)
    return folder


def some_texts(number: int) -> list[str]:
    """Beginnings of real documents, from 40 to about 1,000 characters long."""
    return [TEXTS[i % len(TEXTS)][: 40 + 97 * (i % 11)] for i in range(number)]


def no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing may open the documents of a corpus, or tokenize them."""
    import datasets

    from pipeline import corpus

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a document was read")

    for place, name in [
        (corpus, "documents_of"),
        (corpus.Tokenizing, "__call__"),
        (datasets.Dataset, "from_file"),
    ]:
        monkeypatch.setattr(place, name, refused)
