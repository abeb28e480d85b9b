"""A few seconds of the fuzzers, the same cases each time."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from storage import LogitDataset
from tests.fuzz.fuzz_dump import KINDS, fuzz, mutations
from tests.helpers.records import make_dump


def test_any_dump_is_read_or_named() -> None:
    found = fuzz(seconds=600, seed=0, cases=60, limit=False)
    found.pop("MiB at the peak")
    assert sum(found.values()) == 60
    assert found["CorruptShard"] > 20
    assert found["read"] > 0, "no case got past the gate: what lies behind it is not fuzzed"


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_every_kind_of_change_changes_something(tmp_path: Path, number: int) -> None:
    shape = KINDS[number]
    changed: Counter[str] = Counter()
    for index, change in enumerate(mutations(**shape)):
        for seed in range(3):
            path = tmp_path / f"{index}-{seed}"
            make_dump(path, shards=1, rows=3, **shape)
            assert len(LogitDataset(path)) == 3
            before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
            change(np.random.default_rng(seed), path)
            after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
            changed[str(index)] += before != after
    assert len(changed) == len(mutations(**shape))
    assert all(changed.values())
