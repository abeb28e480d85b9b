"""Token ids and their masks: whole numbers of the vocabulary, one mark for each, or an error."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.token_columns import IGNORED, TokenColumns

VOCABULARY = 1000
IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=20)


def from_json(tokens: Any, marks: Any = None, mask: str | None = None) -> tuple[Any, Any]:
    columns = TokenColumns("input_ids", mask, VOCABULARY)
    return columns.of_json({"input_ids": tokens, mask: marks}, ConfigError)


def from_arrow(tokens: Any, marks: Any = None, mask: str | None = None) -> tuple[Any, Any]:
    columns = TokenColumns("input_ids", mask, VOCABULARY)
    kind = pa.list_(pa.uint64()) if tokens == [2**63] else None
    row = [pa.array([each], kind)[0] for each in (tokens, marks)[: len(columns.names)]]
    return columns.of_arrow(row, ConfigError)


BOTH = pytest.mark.parametrize("read", [from_json, from_arrow])


@BOTH
@given(IDS)
def test_ids_are_kept_as_they_are(read: Any, ids: list[int]) -> None:
    found, targets = read(ids)
    assert found.dtype == np.int32
    assert found.tolist() == ids
    assert targets is None


@BOTH
@given(st.data())
def test_a_mask_is_of_bools_or_of_0_and_1(read: Any, data: st.DataObject) -> None:
    ids = data.draw(IDS)
    marks = [data.draw(st.booleans()) for _ in ids]
    for given_marks in (marks, [int(mark) for mark in marks]):
        found, targets = read(ids, given_marks, "loss_mask")
        assert found.tolist() == ids
        assert targets.dtype == bool
        assert targets.tolist() == marks


@BOTH
@given(st.data())
def test_labels_are_ids_or_ignored(read: Any, data: st.DataObject) -> None:
    ids = data.draw(IDS)
    marks = [data.draw(st.booleans()) for _ in ids]
    labels = [id if mark else IGNORED for id, mark in zip(ids, marks, strict=True)]
    assert read(ids, labels, "labels")[1].tolist() == marks


@BOTH
@given(st.data())
def test_one_wrong_label_is_found(read: Any, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20))
    at = data.draw(st.integers(0, len(ids) - 1))
    labels = [*ids]
    wrong = data.draw(st.integers(-200, 2000).filter(lambda each: each not in (ids[at], IGNORED)))
    labels[at] = wrong
    with pytest.raises(ConfigError, match=rf"label {wrong} at token {at} of .*which is {ids[at]} "):
        read(ids, labels, "labels")


@BOTH
@pytest.mark.parametrize("last", [IGNORED, 0])
@pytest.mark.parametrize("prompt", [0, 2])
def test_labels_that_are_shifted_by_one_are_called_so(read: Any, last: int, prompt: int) -> None:
    ids = [5, 6, 7, 8, 9]
    labels = [*[IGNORED] * prompt, *ids[1 + prompt :], last]
    with pytest.raises(ConfigError, match="Shift them back by one"):
        read(ids, labels, "labels")


@BOTH
def test_other_wrong_labels_are_not_called_shifted(read: Any) -> None:
    with pytest.raises(ConfigError) as error:
        read([5, 6, 7, 8], [5, 6, 8, 8], "labels")
    assert "Shift" not in str(error.value)


@BOTH
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, VOCABULARY, 2], "id 1000 at token 1 .* ids are 0 to 999"),
        ([1, -1], "id -1 at token 1"),
        ([1, 2**40], "id 1099511627776 at token 1"),
        ([2**63], "2\\*\\*63"),
        ([1.0, 2.0], "expected whole numbers in column 'input_ids', found a list of double"),
        ([True, False], "found a list of bool"),
        (["1", "2"], "found a list of string"),
        ([[1], [2]], "found a list of list"),
        ([{"id": 1}], "found a list of struct"),
        ([1, None, 3], "found null at token 1"),
        ([None, None], "found null at token 0"),
        (7, "expected a list of whole numbers in column 'input_ids', found int"),
        ("1 2", "expected a list of whole numbers in column 'input_ids', found str"),
        (None, "expected a list of whole numbers in column 'input_ids', found null"),
    ],
)
def test_what_is_no_list_of_ids(read: Any, ids: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(ids)


@BOTH
@pytest.mark.parametrize(
    ("column", "marks", "words"),
    [
        ("loss_mask", [1, 0], "3 tokens in 'input_ids', but 2 marks in 'loss_mask'"),
        ("loss_mask", [1, 0, 1, 1], "but 4 marks"),
        ("loss_mask", [], "but 0 marks"),
        ("loss_mask", None, "in column 'loss_mask', found null"),
        ("loss_mask", [1, 0, 2], "expected 0 or 1 in the mask 'loss_mask', found 2 at token 2"),
        ("loss_mask", [1, -100, 1], "found -100 at token 1. Labels are read from a column with"),
        ("loss_mask", [0.5, 0.0, 1.0], "found a list of double"),
        ("loss_mask", [1, None, 1], "found null at token 1"),
        ("loss_mask", [[1, 1, 1]], "found a list of list"),
        ("labels", [True, True, True], "found a list of bool"),
        ("labels", [5, 6], "but 2 marks in 'labels'"),
        ("my_Labels", [0, 1, 1], "label 0 at token 0"),
    ],
)
def test_what_is_no_mask(read: Any, column: str, marks: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read([5, 6, 7], marks, column)


@pytest.mark.parametrize("ids", [[1, 2.5], [1, True], [1, "2"], [1, [2]], [1, 2**64]])
def test_numbers_of_several_kinds_in_json(ids: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected whole numbers|2\*\*63"):
        from_json(ids)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int32(), pa.uint64()])
@pytest.mark.parametrize("of", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3)])
def test_lists_of_every_width(kind: pa.DataType, of: Any) -> None:
    columns = TokenColumns("input_ids", None, VOCABULARY)
    (row,) = pa.array([[1, 2, 120]], of(kind))
    assert columns.of_arrow([row], ConfigError)[0].tolist() == [1, 2, 120]


@BOTH
def test_a_document_too_long(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.token_columns.LONGEST", 10)
    assert len(read([1] * 10)[0]) == 10
    with pytest.raises(ConfigError, match="document of more than 10 tokens"):
        read([1] * 11)


NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-101, 1001) | st.floats() | st.booleans()
VALUES = st.recursive(
    st.none() | NUMBERS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)


@given(st.lists(NUMBERS, max_size=5) | VALUES, st.lists(NUMBERS, max_size=5) | VALUES)
@pytest.mark.parametrize("mask", [None, "loss_mask", "labels"])
def test_any_json_is_a_document_or_an_error(mask: str | None, tokens: Any, marks: Any) -> None:
    try:
        ids, targets = from_json(tokens, marks, mask)
    except ConfigError:
        return
    assert ids.tolist() == tokens
    assert all(type(each) is int and 0 <= each < VOCABULARY for each in tokens)
    if mask == "labels":
        kept = [id for id, mark in zip(tokens, targets, strict=True) if mark]
        assert [mark for mark in marks if mark != IGNORED] == kept
    elif mask is not None:
        assert targets.tolist() == marks
