"""Repeated rows are those that a reader with a dictionary would find."""

import tracemalloc

import hypothesis
from hypothesis import strategies as st

from storage import row_keys
from storage.row_keys import HASH_BYTES, RowKeys, key_of, repeated_in

ROWS = st.lists(st.lists(st.tuples(st.sampled_from("abcde\0é"), st.integers(0, 2)), max_size=6))


@hypothesis.given(ROWS)
def test_repeated_rows_are_those_of_a_dictionary(shards: list[list[tuple[str, int]]]) -> None:
    seen: dict[tuple[str, int], int] = {}
    expected: dict[int, tuple[int, int]] = {}
    for number, rows in enumerate(shards):
        for at, row in enumerate(rows):
            if row in seen:
                expected[number] = at, seen[row]
                break
            seen[row] = number
    with RowKeys() as keys:
        for number, rows in enumerate(shards):
            keys.add(number, b"".join(key_of(*row) for row in rows))
        assert keys.repeated() == expected


def test_document_and_chunk_are_not_confused() -> None:
    rows = [("a", 1), ("a", 11), ("1 a", 1), ("a 1", 1), (" a", 1), ("", 1), ("", 0)]
    found = {key_of(*row) for row in rows}
    assert len(found) == len(rows)
    assert {len(key) for key in found} == {HASH_BYTES}


def test_keys_that_end_in_zeros_are_told_apart() -> None:
    with RowKeys() as keys:
        for number in range(3):
            keys.add(number, b"\1" + bytes([number]) + bytes(HASH_BYTES - 2))
        assert keys.repeated() == {}
        keys.add(3, b"\1" + bytes(HASH_BYTES - 1))
        assert keys.repeated() == {3: (0, 0)}


def test_a_file_is_a_small_share_of_the_rows() -> None:
    """So memory stays flat: each file is sorted by itself."""
    with RowKeys() as keys:
        keys.add(0, b"".join(key_of(str(number), 0) for number in range(100_000)))
        sizes = [file.seek(0, 2) for file in keys.files]
        assert sum(sizes) == 100_000 * row_keys.KEY.itemsize
        assert max(sizes) < 2 * sum(sizes) / len(sizes)
        tracemalloc.start()
        keys.repeated()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < sum(sizes) / 10
    assert all(file.closed for file in keys.files)
    assert len(repeated_in(b"")) == 0
