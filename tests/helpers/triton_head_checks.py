"""The kernel of the head step in Triton's interpreter; test_head.py runs this file with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.teacher.head import groups_of as plain
from pipeline.teacher.head_triton import groups_of
from tests.helpers.canaries import Guarded, guarding


@pytest.mark.parametrize("members", [8, 64])
@pytest.mark.parametrize("groups", [1, 16, 37, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups(members: int, groups: int, dtype: torch.dtype) -> None:
    """Rows with a stride, between values that would change every result."""
    torch.manual_seed(groups)
    size = members * groups
    wide = torch.full((5, size + 7), torch.nan)
    wide[1:4, 3 : 3 + size] = torch.randn(3, size) * 4
    wide = wide.to(dtype)
    logits = wide[1:4, 3 : 3 + size]
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    top, lse = groups_of(logits, groups, members)
    wanted_top, wanted = plain(logits.double(), groups, members)
    assert torch.equal(top, wanted_top)
    torch.testing.assert_close(lse, wanted, rtol=1e-6, atol=1e-6)
    assert torch.isneginf(lse[1]).all()


def test_nan_is_seen() -> None:
    logits = torch.zeros(1, 160)
    logits[0, 21] = torch.nan
    _, lse = groups_of(logits, 20, 8)
    assert torch.isnan(lse).nonzero().tolist() == [[0, 1]]


def test_columns_that_are_not_side_by_side() -> None:
    logits = torch.randn(320, 2).t()
    for found, wanted in zip(groups_of(logits, 20, 16), plain(logits, 20, 16), strict=True):
        torch.testing.assert_close(found, wanted)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 700), st.sampled_from([8, 16, 64]), st.integers(0, 9),
    st.integers(0, 9),
)  # fmt: skip
def test_no_memory_is_touched_but_its_own(
    rows: int, groups: int, members: int, ahead: int, gap: int
) -> None:
    """Any shape and distance between rows, with NaN around each row and each buffer."""
    torch.manual_seed(rows)
    logits = Guarded(torch.randn(rows, groups * members), ahead, gap)
    with guarding() as made:
        found = groups_of(logits.values, groups, members)
    for one, wanted in zip(found, plain(logits.values.double(), groups, members), strict=True):
        torch.testing.assert_close(one.double(), wanted.double(), rtol=1e-6, atol=1e-6)
    assert len(made) == 2
    assert all(x.whole() for x in made)
    assert logits.unchanged()
