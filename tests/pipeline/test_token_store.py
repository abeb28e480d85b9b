"""A store gives the rows that were written, whole, or it is none."""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import token_store
from pipeline.token_store import (
    STORE,
    Part,
    PartSums,
    Row,
    TokenStore,
    find_store,
    finish,
    schema_of,
    sums_of,
    write_part,
)
from storage.targets import positions_of

ids = st.lists(st.integers(0, (1 << 31) - 1), min_size=1, max_size=9)


def row(document: int, tokens: list[int], masked: bool = False) -> Row:
    mask = np.array([token % 2 == 0 for token in tokens])
    return Row.of(document, 0, np.array(tokens, np.int32), mask if masked else None, masked)


def write(
    folder: Path, parts: list[list[Row]], masked: bool = False, most: int = 1 << 31
) -> TokenStore:
    schema, sums = schema_of(most, masked), list[PartSums]()
    for number, rows in enumerate(parts):
        path = folder / f"{number}.arrow"
        write_part(path, rows, schema)
        found = sums_of(path, schema)
        assert found is not None
        sums.append(found)
    return finish(folder, sums, {}, {"documents": 9})


@given(st.lists(st.lists(ids, max_size=5), max_size=4), st.booleans(), st.integers(1, 12))
def test_rows_are_read_as_they_were_written(
    parts: list[list[list[int]]], masked: bool, batch: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(token_store, "BATCH_TOKENS", batch)
        given = [[row(at, tokens, masked) for at, tokens in enumerate(part)] for part in parts]
        written, found = write(Path(name), given, masked), find_store(Path(name))
        assert found is not None
        assert found.content == written.content
        rows = [each for part in given for each in part]
        assert len(found) == len(rows)
        for at, expected in enumerate(rows):
            tokens, targets = found[at]
            assert (tokens.dtype, tokens.tolist()) == (np.int32, expected.input_ids.tolist())
            assert (targets is None) == (not masked)
            if masked:
                positions = positions_of(targets, len(tokens))
                assert positions.tolist() == positions_of(expected.targets, len(tokens)).tolist()
                assert not targets[0]
        lengths = [len(each.input_ids) for each in rows]
        assert found.column("length").tolist() == lengths
        assert found.column("document").tolist() == [each.document for each in rows]
        assert found.column("target_count").tolist() == [each.target_count for each in rows]
        assert (found.total("tokens"), found.longest) == (sum(lengths), max(lengths, default=0))
        assert found.total("targets") == sum(each.target_count for each in rows)
        assert found.total("documents") == sum(map(len, given))
        with pytest.raises(IndexError):
            found[len(rows)]


@pytest.mark.parametrize(("most", "size"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_two_bytes_where_they_can(tmp_path: Path, most: int, size: int) -> None:
    found = write(tmp_path, [[row(0, [0, most - 1])]], most=most)
    assert found.part(0).batches[0].ids.itemsize == size
    assert found[0][0].tolist() == [0, most - 1]


def test_an_id_that_does_not_fit_is_never_cut(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="none of the tokenizer"):
        write(tmp_path, [[row(0, [1 << 16])]], most=1 << 16)
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_can_be_changed(tmp_path: Path) -> None:
    found = write(tmp_path, [[row(0, [1, 2])]])
    found[0][0][:] = 7
    assert found[0][0].tolist() == [1, 2]


def test_another_process_maps_the_files_itself(tmp_path: Path) -> None:
    found = write(tmp_path, [[row(0, [1] * 100_000)]])
    assert len(found[0][0]) == 100_000
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    assert pickle.loads(sent)[0][0].tolist() == [1] * 100_000


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garble(path: Path) -> None:
    path.write_bytes(b"{" * path.stat().st_size)


@pytest.mark.parametrize("name", [STORE, "1.arrow"])
@pytest.mark.parametrize("harm", [Path.unlink, shorten])
def test_a_store_that_lacks_something_is_none(tmp_path: Path, name: str, harm) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, [[row(0, [1, 2])], [row(1, [3, 4])]])
    assert find_store(tmp_path) is not None
    harm(tmp_path / name)
    if (name, harm) == (STORE, shorten):  # its last byte is the end of a line
        shorten(tmp_path / STORE)
    assert find_store(tmp_path) is None


@pytest.mark.parametrize("content", ["[]", "{}", '{"facts": 1, "parts": [{}]}', '{"parts": 3}'])
def test_a_store_json_of_something_else_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / STORE).write_text(content)
    assert find_store(tmp_path) is None


@pytest.mark.parametrize("harm", [shorten, garble, Path.unlink])
def test_a_damaged_part_has_no_sums(tmp_path: Path, harm) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, [[row(0, [1, 2])]])
    harm(tmp_path / "0.arrow")
    assert sums_of(tmp_path / "0.arrow", schema_of(1 << 31, False)) is None


def test_a_part_of_other_columns_is_none(tmp_path: Path) -> None:
    write(tmp_path, [[row(0, [1, 2])]])
    for other in (schema_of(1 << 31, True), schema_of(9, False)):
        assert sums_of(tmp_path / "0.arrow", other) is None


def test_opening_maps_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [[row(at, [1, 2])] for at in range(5)])
    opened, real = list[str](), Part.open.__func__  # type: ignore[attr-defined]

    def noted(kind, path, schema=None):  # type: ignore[no-untyped-def]
        opened.append(path.name)
        return real(kind, path, schema)

    monkeypatch.setattr(Part, "open", classmethod(noted))
    found = find_store(tmp_path)
    assert found is not None
    assert (found.total("tokens"), found.longest, len(found), opened) == (10, 2, 5, [])
    for _ in range(2):
        assert found[3][0].tolist() == [1, 2]
    assert opened == ["3.arrow"]
