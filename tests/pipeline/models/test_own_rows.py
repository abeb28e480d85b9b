"""A packed row as a batch with a row for each sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.own_rows import padded_tokens, padding, places


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_a_batch_holds_each_sequence_and_goes_back_into_the_row(lengths: list[int]) -> None:
    row = torch.arange(sum(lengths))
    padded, real = places(lengths)
    assert padded.shape == (len(lengths), max(lengths))
    assert padded_tokens(lengths) == padded.numel()
    for sequence, expected in zip(padded, row.split(lengths), strict=True):
        assert sequence[: len(expected)].equal(expected)
        assert (sequence[len(expected) :] == expected[-1]).all()
    assert row[padded].flatten()[real].equal(row)


def test_the_cost_is_the_share_of_padding() -> None:
    assert padding([[4, 2], [3]]) == pytest.approx(2 / 11)
    assert padding([[7]]) == padding([]) == 0
