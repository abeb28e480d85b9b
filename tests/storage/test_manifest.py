"""Plans, markers and the manifest; totals over markers."""

from pathlib import Path

import numpy as np
import pytest

from storage import IncompleteDump, LogitDataset, PlanMismatch, create_dump
from storage.manifest import Totals
from tests.helpers.records import make_dump, plan


def test_another_plan_is_refused_with_the_difference(tmp_path: Path) -> None:
    create_dump(tmp_path, plan(teacher={"name": "a", "dtype": "bfloat16"}))
    create_dump(tmp_path, plan(teacher={"name": "a", "dtype": "bfloat16"}))  # the same: opens
    with pytest.raises(PlanMismatch) as refused:
        create_dump(tmp_path, plan(teacher={"name": "b", "dtype": "bfloat16"}, k=9))
    lines = str(refused.value).splitlines()[1:-1]
    assert lines == [
        "  k: 8 in the dump, 9 asked for",
        "  teacher.name: 'a' in the dump, 'b' asked for",
    ]


def test_no_dump_at_all_says_so(tmp_path: Path) -> None:
    with pytest.raises(IncompleteDump, match=r"no plan\.json"):
        LogitDataset(tmp_path / "nowhere")


def test_totals_are_those_of_the_rows(tmp_path: Path) -> None:
    dump = make_dump(tmp_path, shards=3, k=8, samples=12)
    markers = [shard.marker for shard in dump.shards()]
    totals, records = Totals.of(iter(markers)), list(LogitDataset(tmp_path))
    assert (totals.shards, totals.rows) == (3, len(records))
    assert totals.tokens == sum(len(record.input_ids) for record in records)
    assert totals.positions == sum(len(record.topk) for record in records)
    assert totals.entries == sum(len(record.topk.ids) for record in records)
    samples = [record.topk.samples for record in records if record.topk.samples]
    assert totals.sampled_ids == sum(len(one.ids) for one in samples) > 0
    assert 0 < totals.sample_bytes < totals.bytes
    assert totals.bytes == sum((tmp_path / shard.file).stat().st_size for shard in dump.shards())
    assert totals.bytes_per_token == totals.bytes / totals.tokens
    kept = np.concatenate([record.topk.kept_mass() for record in records])
    assert totals.kept_mass == pytest.approx(kept.mean(), abs=0.02)
    assert totals.codec_kl == sum(marker["kl_sum"] for marker in markers) / totals.positions
    assert totals.kl_max == max(marker["kl_max"] for marker in markers)
    assert totals.documents == 0


def test_totals_count_documents_where_markers_do(tmp_path: Path) -> None:
    markers = [shard.marker for shard in make_dump(tmp_path).shards()]
    totals = Totals.of({**marker, "documents": 4} for marker in markers)
    assert (totals.documents, totals.sampled_ids, totals.sample_bytes) == (8, 0, 0)


@pytest.mark.parametrize("shards", [0, 1])
def test_totals_without_rows_have_no_means(tmp_path: Path, shards: int) -> None:
    dump = make_dump(tmp_path, shards=shards, rows=0)
    totals = Totals.of(shard.marker for shard in dump.shards())
    assert (totals.shards, totals.rows, totals.kl_max) == (shards, 0, 0)
    assert (totals.bytes_per_token, totals.kept_mass, totals.codec_kl) == (None, None, None)
