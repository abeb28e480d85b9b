"""--summary: its folder is made before the work, or the script ends before it."""

import json
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config import DumpConfig

WORDS = ["--model", "m", "--corpus.path", "c", "--output", "o"]


def test_the_folder_of_the_summary_is_made(tmp_path: Path) -> None:
    file = tmp_path / "no" / "such" / "folder" / "s.json"
    parser = cli.script_parser(DumpConfig, "test")
    _, own = cli.parse(parser, DumpConfig, [*WORDS, "--summary", str(file)])
    assert file.parent.is_dir()
    assert cli.main(lambda: {"rows": 3}, own.summary) == 0
    assert json.loads(file.read_text()) == {"rows": 3}


@pytest.mark.parametrize("place", ["file/s.json", "folder"])
def test_a_summary_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    parser = cli.script_parser(DumpConfig, "test")
    with pytest.raises(SystemExit) as stopped:
        cli.parse(parser, DumpConfig, [*WORDS, "--summary", str(tmp_path / place)])
    assert stopped.value.code == 2
    assert "error: --summary" in capsys.readouterr().err
