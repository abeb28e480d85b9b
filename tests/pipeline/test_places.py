"""Where a run may write."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import cli, demo, generate
from pipeline.config import CorpusConfig, EvalConfig, GenerateConfig, HeldOutConfig
from pipeline.dump import dump
from pipeline.errors import ConfigError
from pipeline.evaluation import evaluate
from pipeline.places import check_output, inputs_of, refuse_inputs_inside
from pipeline.report import report
from pipeline.study import config as study_config
from pipeline.study import study
from pipeline.study.config import ArmConfig, StudyConfig
from pipeline.training import train
from tests.helpers import dumps
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model
from tests.helpers.runs import settings


def test_an_output_with_the_model_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    model = tiny_model(tmp_path / "run" / "model")
    weights = (model / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for spelling in (str(tmp_path / "run"), "run/", "./link", "run/../run", "."):
        config = settings(tmp_path, model, None, domain, mix=0, max_length=64, output=spelling)
        with pytest.raises(ConfigError, match=r"contains model .*choose another output"):
            train.run(config)
    assert (model / "model.safetensors").read_bytes() == weights
    assert os.listdir(tmp_path / "run") == ["model"]  # nothing was written


def test_every_input_is_looked_at(tmp_path: Path, model_path: Path, dump_path: Path) -> None:
    outside = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    (tmp_path / "run").mkdir()
    inside = CorpusConfig(str(write_texts(tmp_path / "run" / "a.jsonl", some_texts(3))))
    (tmp_path / "run" / "dump").symlink_to(dump_path)
    dump = str(tmp_path / "run" / "dump")
    for name, changes in {
        "domain.path": {"domain": inside},
        "held_out.other.path": {"held_out": HeldOutConfig(other=inside)},
        "held_out.dump": {"held_out": HeldOutConfig(dump=dump)},
        "dump .*/run/dump": {"dump": {dump: 1.0, str(dump_path): 1.0}},
    }.items():
        config = settings(tmp_path, model_path, dump_path, outside)
        for field, value in changes.items():
            setattr(config, field, value)
        with pytest.raises(ConfigError, match=f"contains {name} "):
            train.run(config)
    assert sorted(os.listdir(tmp_path / "run")) == ["a.jsonl", "dump"]


def test_patterns_stores_and_the_hub(tmp_path: Path) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "a.jsonl").touch()
    refuse_inputs_inside(tmp_path / "run", {"model": "Qwen/Qwen3-8B", "dump": "s3://bucket/run"})
    refuse_inputs_inside(tmp_path / "run", {"model": str(tmp_path / "running")})
    with pytest.raises(ConfigError, match="contains domain"):
        refuse_inputs_inside(tmp_path / "run", {"domain": str(tmp_path / "**" / "*.jsonl")})


def test_an_output_in_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    inputs = {"domain.path": str(tmp_path)}
    for output in (tmp_path / "run", tmp_path / "link" / "run", tmp_path):
        with pytest.raises(ConfigError, match=r"(lies in|contains) domain\.path"):
            check_output(str(output), inputs)
    check_output(str(tmp_path), {"model": "Qwen/Qwen3-8B"})
    check_output(str(tmp_path) + "-beside", inputs)


@pytest.mark.parametrize(
    ("output", "given", "nested"),
    [
        ("s3://b/runs", "s3://b/runs/corpus", True),
        ("s3://b/corpus/dump", "s3://b/corpus/", True),
        ("s3://b/dump", "s3://b/dump", True),
        ("s3://b/dump-2", "s3://b/dump", False),
        ("s3://b/dump", "local", False),
    ],
)
def test_places_in_a_store(output: str, given: str, nested: bool) -> None:
    if nested:
        with pytest.raises(ConfigError, match="lie in one another"):
            check_output(output, {"corpus.path": given})
    else:
        check_output(output, {"corpus.path": given})


def test_what_a_script_reads(tmp_path: Path) -> None:
    config = settings(tmp_path, Path("m"), None, Path("d"), mix=0, max_length=9)
    config.dump = {"one": 1.0, "two": 2.0}
    config.held_out = HeldOutConfig(general=CorpusConfig("g"), dump="h")
    assert dict(inputs_of(config)) == {
        "model": "m",
        "domain.path": "d",
        "dump one": "one",
        "dump two": "two",
        "held_out.general.path": "g",
        "held_out.dump": "h",
    }
    measured = EvalConfig({"base": "b", "student": "s"}, domain=CorpusConfig("d"))
    assert dict(inputs_of(measured)) == {"models b": "b", "models s": "s", "domain.path": "d"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "models" / "base")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    return write_texts(tmp_path / "texts" / "a.jsonl", some_texts(3))


def refused(work: Callable[[], object], output: Path) -> None:
    before = sorted(output.parent.rglob("*")) if output.parent.exists() else []
    with pytest.raises(ConfigError, match=r"contains |lies in "):
        work()
    after = sorted(output.parent.rglob("*")) if output.parent.exists() else []
    assert after == before


def test_dumps_and_generated_corpora_keep_out_of_models(
    tmp_path: Path, model: Path, corpus: Path
) -> None:
    for output in (model / "dump", model, tmp_path / "models", corpus.parent, tmp_path):
        given = dumps.settings(tmp_path, model, corpus, output=str(output))
        refused(lambda given=given: dump.run(given), output)
        made = GenerateConfig(str(model), str(output), 10, prompts=CorpusConfig(str(corpus)))
        refused(lambda made=made: generate.run(made), output)
    inside = dumps.settings(tmp_path, model, corpus.parent, output=str(corpus.parent / "dump"))
    refused(lambda: dump.run(inside), corpus.parent / "dump")


def test_results_keep_out_of_inputs(tmp_path: Path, model: Path, corpus: Path) -> None:
    for output in (model / "results.json", corpus, model / "config.json"):
        config = EvalConfig({"base": str(model)}, CorpusConfig(str(corpus)), output=str(output))
        refused(lambda config=config: evaluate.run(config), output)


def test_summaries_keep_out_of_inputs(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--models.base={model}", f"--domain.path={corpus}"]
    for file in (model / "new" / "s.json", model / "config.json", corpus):
        held = file.read_bytes() if file.exists() else None
        with pytest.raises(SystemExit) as ended:
            cli.parse(
                cli.script_parser(EvalConfig, ""), EvalConfig, [*given, "--summary", str(file)]
            )
        assert ended.value.code == 2
        assert "--summary" in capsys.readouterr().err
        assert (file.read_bytes() if file.exists() else None) == held
    assert not (model / "new").exists()
    cli.parse(
        cli.script_parser(EvalConfig, ""), EvalConfig, [*given, f"--summary={tmp_path}/s.json"]
    )


def test_a_page_keeps_out_of_its_dump(dump_path: Path) -> None:
    plan = (dump_path / "plan.json").read_bytes()
    for name in ("plan.json", "page.html"):
        refused(lambda name=name: report.run(str(dump_path), str(dump_path / name)), dump_path)
    assert (dump_path / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("place", ["file", "file/run", "file/run/one", "lost", "lost/run"])
def test_a_file_in_the_way_of_an_output_is_named(
    tmp_path: Path, model_path: Path, corpus: Path, place: str
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "lost").symlink_to("nowhere")
    there, output = place.split("/")[0], str(tmp_path / place)
    where = "" if place == there else f" at {tmp_path / there}"
    found = "a file" if there == "file" else "a link that leads nowhere"
    expected = f"output {output}: expected a directory{where}, found {found}; choose another output"

    base, source = str(model_path), CorpusConfig(str(corpus))
    held_out = study_config.HeldOutConfig(domain=source, general=source)
    arms = {"ce": ArmConfig(train={"mix": 0})}
    config = settings(tmp_path, model_path, None, corpus, mix=0, max_length=64, output=output)
    works: list[Callable[[], object]] = [
        lambda: train.run(config),
        lambda: dump.run(dumps.settings(tmp_path, model_path, corpus, output=output)),
        lambda: study.run(StudyConfig(base, source, source, held_out, output, arms)),
        lambda: generate.run(GenerateConfig(base, output, 10, prompts=source)),
        lambda: demo.run(output, {}),
    ]
    for work in works:
        with pytest.raises(ConfigError, match=re.escape(expected)):
            work()
    assert (tmp_path / "file").read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()


def test_what_is_in_the_way_of_a_written_file_is_named(
    tmp_path: Path, model: Path, corpus: Path, dump_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    for output, message in [
        (tmp_path / "file" / "a", f"expected a directory at {tmp_path / 'file'}, found a file"),
        (tmp_path, "expected a file, found a directory"),
    ]:
        config = EvalConfig({"base": str(model)}, CorpusConfig(str(corpus)), output=str(output))
        for work in (
            lambda config=config: evaluate.run(config),
            lambda output=output: report.run(str(dump_path), str(output)),
        ):
            with pytest.raises(ConfigError, match=re.escape(f"output {output}: {message}")):
                work()
    assert (tmp_path / "file").read_text() == "kept"
