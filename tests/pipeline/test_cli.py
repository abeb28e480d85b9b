"""--summary: its folder is made before the work, or the script ends before it."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline import cli
from pipeline.config import DumpConfig, TrainConfig
from pipeline.errors import BAD_INPUT

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


def refused(file: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a config file with this text, which is bad input."""
    file.write_text(text)
    parser = cli.script_parser(DumpConfig, "test")
    with pytest.raises(SystemExit) as stopped:
        cli.parse(parser, DumpConfig, ["--config", str(file), *WORDS])
    assert stopped.value.code == BAD_INPUT
    return capsys.readouterr().err


def bomb(levels: int) -> str:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(["engine_args:", *(f"  {line}" for line in lines)]) + "\n"


@pytest.mark.parametrize(
    "text", [bomb(9), "engine_args: &a {b: *a}\n", "engine_args: {a: &a [*a]}"]
)
def test_a_small_file_of_many_values_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refused(tmp_path / "bomb.yaml", text, capsys)
    assert "aliases (*name) expand" in found
    assert "bomb.yaml" in found


def test_a_list_of_many_values_is_refused() -> None:
    """It has no key."""
    levels = [f"&a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
    with pytest.raises(yaml.YAMLError, match=r"aliases \(\*name\) expand"):
        cli.load_yaml(f"[&a0 [x], {', '.join(levels)}]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k: 8\nmodel: m\nk: 16\n", "k: is in line 1 and again in line 3"),
        ("corpus:\n  path: a\n  path: b\n", "path: is in line 2 and again in line 3"),
        ("engine_args: {a: [{b: 1, 'b': 1}]}\n", "b: is in line 1 and again in line 1"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """YAML would take the last one, such as the second of two arms of one name."""
    found = refused(tmp_path / "twice.yaml", text, capsys)
    assert message in found
    assert "twice.yaml" in found


def test_merged_keys_are_not_twice(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text("engine_args: {a: &a {x: 1, y: 2}, b: {<<: *a, x: 3}}\n")
    parser = cli.script_parser(DumpConfig, "test")
    config, _ = cli.parse(parser, DumpConfig, ["--config", str(file), *WORDS])
    assert config.engine_args["b"] == {"x": 3, "y": 2}


def test_aliases_are_read(tmp_path: Path) -> None:
    file = tmp_path / "fine.yaml"
    file.write_text(bomb(2) + "corpus: &c {path: '*.txt', limit: 3}\n")
    parser = cli.script_parser(DumpConfig, "test")
    config, _ = cli.parse(parser, DumpConfig, ["--config", str(file), "--model=m", "--output=*"])
    assert (config.corpus.path, config.output) == ("*.txt", "*")
    assert config.engine_args["a1"] == [["x"] * 9] * 9


def test_settings_of_a_corpus_that_do_not_fit_end_with_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are found while jsonargparse makes the settings."""
    parser = cli.script_parser(TrainConfig, "")
    given = ["--model", "m", "--output", "o", "--mix", "0", "--max_length", "8"]
    for wrong in (["--domain.prompt_column", "q"], ["--domain.targets", "completion"]):
        with pytest.raises(SystemExit) as ended:
            cli.parse(parser, TrainConfig, [*given, "--domain.path", "c.jsonl", *wrong])
        assert ended.value.code == BAD_INPUT
        assert "error: corpus c.jsonl: " in capsys.readouterr().err
