"""Masks of learnt tokens: the positions they mean, and their bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import CorruptShard
from storage.targets import pack_mask, positions_of, unpack_mask


def test_every_token_but_the_first_is_a_target_without_a_mask() -> None:
    assert positions_of(None, 4).tolist() == [0, 1, 2]
    assert positions_of(None, 1).tolist() == positions_of(None, 0).tolist() == []


def test_a_position_predicts_the_token_after_it() -> None:
    mask = np.array([True, False, True, True, False])
    assert positions_of(mask, 5).tolist() == [1, 2]


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_a_mask_packs_to_a_bit_for_each_token(mask: list[bool]) -> None:
    targets = np.array(mask)
    data = pack_mask(targets)
    assert len(data) == (len(mask) + 7) // 8
    if not any(mask[1:]):
        with pytest.raises(CorruptShard, match="marks no token, expected at least one"):
            unpack_mask(data, len(mask))
        return
    assert unpack_mask(data, len(mask)).tolist() == [False, *mask[1:]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x02\x00", "a mask of 2 bytes, expected 1 for 5 tokens"),
        (b"", "a mask of 0 bytes, expected 1"),
        (b"\x03", "marks the first token"),
        (b"\x22", "or one behind the last"),
    ],
)
def test_bits_that_are_no_mask_of_the_row(data: bytes, message: str) -> None:
    with pytest.raises(CorruptShard, match=message):
        unpack_mask(data, 5)
