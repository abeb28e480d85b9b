"""Settings: YAML, overrides, and errors before any work starts."""

import re
from pathlib import Path

import pytest

from pipeline.cli import parse, script_parser
from pipeline.config import DumpConfig, EvalConfig, GenerateConfig, TrainConfig
from pipeline.study.config import StudyConfig

MINIMAL = "model: m\noutput: o\ncorpus:\n  path: c\n"


def read(tmp_path: Path, yaml: str, *arguments: str) -> DumpConfig:
    file = tmp_path / "config.yaml"
    file.write_text(yaml)
    parser = script_parser(DumpConfig, "test")
    return parse(parser, DumpConfig, ["--config", str(file), *arguments])[0]


def test_yaml_then_dotted_overrides(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        MINIMAL + "k: 32\nengine_args: {tensor_parallel_size: 2}\n",
        *["--corpus.limit", "7", "--k=16"],
    )
    assert (config.k, config.corpus.limit, config.corpus.path) == (16, 7, "c")
    assert config.engine_args == {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        (MINIMAL + "temprature: 1\n", "temprature"),
        (MINIMAL + "  txt_column: a\n", "txt_column"),
        (MINIMAL + "k: many\n", "many"),
        (MINIMAL + "temperature: 2.0\n", "do not determine the distribution"),
        (MINIMAL + "k: 0\n", "k: at least 1"),
        (MINIMAL + "samples: -1\n", "samples: at least 0"),
        (MINIMAL + "k: 60000\nsamples: 6000\n", "together at most 65535"),
        (MINIMAL + "samples: 32\nmin_prob: 0.001\n", "set a smaller k"),
        (MINIMAL + "engine: llama.cpp\n", "llama.cpp"),
        (MINIMAL + "engine_args: {trust_remote_code: true}\n", "trust_remote_code: names code"),
        (MINIMAL + "engine_args: {trust-remote-code: 1}\n", "trust_remote_code: names code"),
        (MINIMAL + "engine_args: {worker_extension_cls: a.B}\n", "names code to run"),
        (MINIMAL + "engine_args: {distributed_executor_backend: a.B}\n", "names code to run"),
        (MINIMAL + "engine_args: {x: [{kv_connector_module_path: a}]}\n", "names code to run"),
        (MINIMAL + "engine_args: {load_format: dummy}\n", "makes the weights up"),
        (MINIMAL + "engine_args: {model: other}\n", "set model"),
        ("output: o\ncorpus:\n  path: c\n", "model"),
    ],
)
def test_impossible_settings_exit_with_2_and_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str, words: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(tmp_path, yaml)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script_parser(DumpConfig, "test").parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Longest sequence in tokens" in text
    assert "Column with the text of each document" in text


CONFIGS = [DumpConfig, GenerateConfig, TrainConfig, EvalConfig, StudyConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_help_shows_each_setting_once_in_three_groups(
    config: type, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = script_parser(config, "test")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    shown = re.findall(r"^  (--[\w.]+)", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    places = [text.index(f"\n{kind} settings:\n") for kind in ("needed", "common", "expert")]
    assert places == sorted(places)
    for name in config.common:
        assert places[1] < text.index(f"\n  --{name} ") < places[2]
    assert places[0] < text.index("\n  --model") < places[1]


def test_a_misspelt_setting_gets_a_suggestion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--corpus.limt", "7"], ["--max_lenght=7"]):
        with pytest.raises(SystemExit):
            read(tmp_path, MINIMAL, *arguments)
    found = capsys.readouterr().err
    assert "did you mean corpus.limit?" in found
    assert "did you mean max_length?" in found


def test_temperature_is_a_setting_where_text_is_generated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        script_parser(GenerateConfig, "test").parse_args(["--temperature", "hot"])
    assert "There is no temperature" not in capsys.readouterr().err
