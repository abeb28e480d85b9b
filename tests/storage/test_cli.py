"""python -m storage inspect | verify | export, as a user runs it."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storage import LogitDataset
from storage.__main__ import main
from tests.helpers.records import make_dump, random_record

DRAWS = 12


def test_inspect_shows_plan_sizes_and_mass(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    make_dump(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in ("vocab_size", "rows       10", "tokens     200", "per token", "kept mass", "█"):
        assert part in text


def test_inspect_row_shows_candidates(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    make_dump(tmp_path)
    assert main(["inspect", str(tmp_path), "--row", "3", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert "document doc-3, chunk 0, 20 tokens" in text
    assert "showing ids" in text
    first = random_record(3).topk.ids[0]
    assert f"<{first}>" in text
    assert main(["inspect", str(tmp_path), "--row", "10"]) == 2


def test_verify_exit_codes(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    dump = make_dump(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    file = tmp_path / dump.shards()[0].file
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["verify", str(tmp_path)]) == 4
    assert f"FAULT  {dump.shards()[0].file}" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("per", ["position", "sequence"])
def test_export_is_plain_parquet(tmp_path: Path, per: str) -> None:
    make_dump(tmp_path / "dump")
    assert (
        main(["export", str(tmp_path / "dump"), str(tmp_path / "out.parquet"), "--per", per]) == 0
    )
    table = pq.read_table(tmp_path / "out.parquet")
    dataset = LogitDataset(tmp_path / "dump")
    ids = [token for row in table.column("ids").to_pylist() for token in row]
    assert ids == [token for record in dataset for token in record.topk.ids.tolist()]
    assert len(table) == (190 if per == "position" else 10)


def test_inspect_and_export_show_samples(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    make_dump(tmp_path / "dump", samples=DRAWS)
    assert main(["inspect", str(tmp_path / "dump")]) == 0
    assert f"samples    {DRAWS} draws" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "dump"), "--row", "0"]) == 0
    assert f"/{DRAWS} of the tail" in capsys.readouterr().out
    dataset = LogitDataset(tmp_path / "dump")
    wanted = [record.topk.samples for record in dataset]
    for per in ("position", "sequence"):
        target = tmp_path / f"{per}.parquet"
        assert main(["export", str(tmp_path / "dump"), str(target), "--per", per]) == 0
        table = pq.read_table(target)
        for column, name in (("sampled_ids", "ids"), ("sampled_times", "times")):
            values = [value for row in table.column(column).to_pylist() for value in row]
            assert values == [value for one in wanted for value in getattr(one, name).tolist()]
    shutil.rmtree(tmp_path / "dump")
    make_dump(tmp_path / "dump")
    assert main(["export", str(tmp_path / "dump"), str(tmp_path / "bare.parquet")]) == 0
    assert "sampled_ids" not in pq.read_table(tmp_path / "bare.parquet").column_names


@pytest.mark.parametrize("command", ["inspect", "verify", "index", "gc", "export"])
def test_a_password_in_a_url_is_refused_and_not_shown(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["out.parquet"] if command == "export" else []
    with pytest.raises(SystemExit) as ended:
        main([command, "s3://AKIAX:S3SECRET@bucket/dump", *more])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "set them in the environment" in shown
    assert "S3SECRET" not in shown
