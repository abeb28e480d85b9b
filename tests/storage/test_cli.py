"""python -m storage inspect | verify | export, as a user runs it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage import LogitDataset
from storage.__main__ import main
from storage.inspect import describe_row
from tests.helpers.records import TARGETS, make_dump, masked_record, random_record

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


def test_inspect_shows_the_learnt_tokens(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """Each learnt token stands in the line of its own position, with its own candidates."""
    dump = make_dump(tmp_path, targets=TARGETS)
    learnt = sum(shard.positions for shard in dump.shards())
    assert main(["verify", str(tmp_path)]) == 0
    assert f"10 rows and 200 tokens, {learnt} of them targets, in 2" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"targets    {learnt:,}  ({learnt / 200:.1%} of the tokens)" in text
    assert f"per token, {sum(s.marker['bytes'] for s in dump.shards()) / learnt:.1f} per " in text
    record = masked_record(3)
    assert main(["inspect", str(tmp_path), "--row", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"20 tokens, {len(record.positions)} of them targets: ⟦learnt⟧" in lines[1]
    shown = [f"<{token}>" for token in record.input_ids]
    inside = re.findall("⟦(.*?)⟧", lines[2])
    assert re.sub("[⟦⟧]", "", lines[2]) == "".join(shown)
    assert "".join(inside) == "".join(shown[at + 1] for at in record.positions)
    ids, _ = record.topk.dense()
    rows = [line.split() for line in lines[5:] if line.strip()]
    for words, at, best in zip(rows, record.positions, ids[:, 0], strict=True):
        assert words[:3] == [str(at), shown[at], shown[at + 1]]
        assert words[4].removeprefix("*") == f"<{best}>"


def test_a_long_prompt_does_not_hide_the_learnt_tokens() -> None:
    mask = np.arange(1000) >= 900
    record = random_record(0, tokens=1000, targets=mask)
    _, text, *_ = describe_row(record, lambda token: f"<{token}>")
    shown = [f"<{token}>" for token in record.input_ids]
    assert text == "… " + "".join(shown[800:900]) + "⟦" + "".join(shown[900:]) + "⟧"


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


def test_export_of_learnt_tokens_says_where_they_stand(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", samples=DRAWS, targets=TARGETS)
    records = list(LogitDataset(tmp_path / "dump"))
    for per in ("position", "sequence"):
        target = str(tmp_path / f"{per}.parquet")
        assert main(["export", str(tmp_path / "dump"), target, "--per", per]) == 0
    table = pq.read_table(tmp_path / "sequence.parquet")
    assert table.column("targets").to_pylist() == [r.targets.tolist() for r in records]  # type: ignore[union-attr]
    assert table.column("input_ids").to_pylist() == [r.input_ids.tolist() for r in records]
    assert table.column("counts").to_pylist() == [r.topk.counts.tolist() for r in records]
    table = pq.read_table(tmp_path / "position.parquet")
    places = [(record, at) for record in records for at in record.positions.tolist()]
    assert table.column("position").to_pylist() == [at for _, at in places]
    assert table.column("token").to_pylist() == [r.input_ids[at] for r, at in places]
    assert table.column("next_token").to_pylist() == [r.input_ids[at + 1] for r, at in places]
    ids = [row.tolist() for record in records for row in record.topk.dense()[0]]
    assert table.column("ids").to_pylist() == ids
    assert len(table.column("sampled_ids")) == len(places)


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
