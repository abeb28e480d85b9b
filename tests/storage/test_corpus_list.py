"""The list of a corpus's files: what is written is read, and nothing else is."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from storage.corpus_list import COLUMNS, LIST_FILE, CorpusList, list_file, read_list
from storage.errors import CorruptShard, FormatVersionError
from storage.parsing import Json, to_json
from storage.store import Store
from tests.helpers.records import FINGERPRINT, some_list

PLAN = {"corpus": {"fingerprint": FINGERPRINT}}
NAME = f"corpus-{FINGERPRINT[:16]}.json"


def forged(change: Json) -> bytes:
    """A list with other values, whose checksum is right."""
    body = {**json.loads(some_list(2).pack()), **change}
    del body["checksum"]
    return to_json({**body, "checksum": hashlib.sha256(to_json(body)).hexdigest()})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert list_file(PLAN) == NAME
    assert LIST_FILE.fullmatch(NAME)
    assert read_list(store, PLAN) is None
    for first in ({}, {"messages": True}, {"mask": None}):
        found = replace(some_list(3), first=first, paths=["a/ä.txt", "b", "c"])
        (tmp_path / NAME).write_bytes(found.pack())
        assert read_list(store, PLAN) == found


@pytest.mark.parametrize("plan", [{}, {"corpus": {}}, {"corpus": {"fingerprint": "other"}}])
def test_a_plan_of_another_maker_has_no_list(tmp_path: Path, plan: Json) -> None:
    assert list_file(plan) is None
    assert read_list(Store(tmp_path), plan) is None


def test_every_changed_byte_is_found() -> None:
    data = some_list(2).pack()
    for at in range(len(data)):
        with pytest.raises((CorruptShard, FormatVersionError), match=NAME):
            CorpusList.unpack(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], NAME)
    for at in range(0, len(data), 7):
        with pytest.raises(CorruptShard, match=NAME):
            CorpusList.unpack(data[:at], NAME)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": [-1, 2]}, "sizes"),
        ({"sizes": [1, True]}, "sizes"),
        ({"sizes": [1, 2, 3]}, "as many"),
        ({"documents": [1 << 60, 1]}, "documents"),
        ({"documents": [1 << 53, 1]}, "documents: expected at most"),
        ({"sizes": [1, 1 << 53]}, "sizes: expected at most"),
        ({"paths": "ab"}, "paths"),
        ({"paths": [1, 2]}, "paths"),
        ({"sha256": ["a", "b"]}, "sha256"),
        ({"samples": [None, None]}, "samples"),
        ({"ids_differ": 1}, "ids_differ"),
        ({"first": []}, "first"),
        ({"version": 0}, "version"),
        ({"fingerprint": "a"}, "fingerprint"),
    ],
)
def test_impossible_values_are_refused(change: Json, words: str) -> None:
    with pytest.raises(CorruptShard, match=words):
        CorpusList.unpack(forged(change), NAME)


def test_empty_lists_are_refused() -> None:
    empty: Json = {key: [] for key in COLUMNS}
    with pytest.raises(CorruptShard, match="paths"):
        CorpusList.unpack(forged(empty), NAME)


def test_a_later_version_is_refused() -> None:
    with pytest.raises(FormatVersionError, match="version 2"):
        CorpusList.unpack(forged({"version": 2}), NAME)


def test_the_list_of_another_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(replace(some_list(2), fingerprint="0" * 64).pack())
    with pytest.raises(CorruptShard, match="fingerprint"):
        read_list(Store(tmp_path), PLAN)


def test_five_thousand_files_take_a_megabyte() -> None:
    assert len(some_list(5000).pack()) < 1e6
