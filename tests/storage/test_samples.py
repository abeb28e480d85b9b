"""Samples: counted from draws, and refused where they do not fit their distributions."""

from dataclasses import replace

import numpy as np
import pytest

from storage import InvalidRecord, Samples, TopK
from storage.topk import check_topk
from tests.helpers.records import VOCAB, some_samples


def test_from_drawn_counts_each_id_of_each_position() -> None:
    found = Samples.from_drawn([[7, 2, 7, 7], [-1] * 4, [0, 0, 0, 0], [3, 2, 1, 0]])
    assert found.draws == 4
    assert found.counts.tolist() == [2, 0, 1, 4]
    assert found.ids.tolist() == [2, 7, 0, 0, 1, 2, 3]
    assert found.times.tolist() == [1, 3, 4, 1, 1, 1, 1]
    assert len(Samples.from_drawn(np.zeros((0, 4))).ids) == 0


def change(topk: TopK, **changes: object) -> TopK:
    assert topk.samples is not None
    return replace(topk, samples=replace(topk.samples, **changes))  # type: ignore[arg-type]


def wrong_records() -> list[tuple[TopK, str]]:
    topk = TopK(
        np.array([1, 1], np.uint16), np.array([4, 4], np.int32),
        np.array([-0.5, 0], np.float32), np.array([-0.93, -np.inf], np.float32),
        Samples.from_drawn([[1, 9, 9], [-1, -1, -1]]),
    )  # fmt: skip
    check_topk(topk, VOCAB)
    two = np.array([2, 0], np.uint16)
    return [
        (
            change(topk, ids=np.array([9, 1], np.int32)),
            "position 0: sampled ids are not in ascending order",
        ),
        (
            change(topk, ids=np.array([9, 9], np.int32)),
            "position 0: sampled ids are not in ascending order",
        ),
        (change(topk, ids=np.array([1, VOCAB], np.int32)), f"position 0: id {VOCAB} is outside"),
        (change(topk, ids=np.array([1, 4], np.int32)), "position 0: id 4 is both kept and sampled"),
        (change(topk, times=two + 1), "position 0: 4 draws, expected 3"),
        (change(topk, times=np.array([3, 0], np.uint16)), "position 0: id 9 was drawn 0 times"),
        (change(topk, times=two[:1]), "counts sum to 2 samples, found 2 ids and 1 times"),
        (change(topk, draws=0), "0 draws, expected 1 to 65535"),
        (change(topk, counts=two[:1]), "2 positions, but the samples have 1"),
        (
            replace(topk, samples=some_samples(3, 2)),
            "position 1: .* sampled ids with a tail of -inf",
        ),
        (
            replace(topk, tail_logprob=np.array([-0.93, -20], np.float32)),
            "position 1: 0 sampled ids with a tail of -20",
        ),
    ]


@pytest.mark.parametrize(("topk", "message"), wrong_records())
def test_what_are_no_samples_of_the_tail_is_refused(topk: TopK, message: str) -> None:
    with pytest.raises(InvalidRecord, match=message):
        check_topk(topk, VOCAB)
