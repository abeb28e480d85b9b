"""A small study through the real script."""

import json
import math
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import CorpusConfig, HeldOutConfig
from pipeline.errors import ConfigError, RefusedError
from pipeline.report import report
from pipeline.study import study
from pipeline.study.config import ArmConfig, StudyConfig
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.questions import write_questions


@pytest.fixture
def settings(tmp_path: Path, model_path: Path) -> dict[str, Any]:
    """A study of tiny runs. The dump holds the whole vocabulary, as a live teacher has it."""
    texts = some_texts(22)
    domain = {"path": str(write_texts(tmp_path / "domain.jsonl", [t[::-1] for t in texts]))}
    general = {"path": str(write_texts(tmp_path / "general.jsonl", texts))}
    other = {"path": str(write_texts(tmp_path / "other.jsonl", [t.swapcase() for t in texts]))}
    return {
        "model": str(model_path),
        "output": str(tmp_path / "study"),
        "domain": {**domain, "skip": 6},
        "general": {**general, "skip": 6},
        "held_out": {
            "sequences": 10,
            "domain": {**domain, "limit": 6},
            "general": {**general, "limit": 6},
            "other": {**other, "limit": 6},
        },
        "max_length": 64,
        "dumps": {"all": {"k": 512, "min_prob": 0, "codec": "v1", "engine": "transformers"}},
        "seeds": [0, 1],
        "learning_rates": [1e-3],
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1},
        "measure": {"curve_steps": 2, "curve_sequences": 10},
        "arms": {
            "half": {"interpolate": "ce", "weight": 0.5},
            "ce": {"train": {"mix": 0}},
            "mol": {},
            "live": {"targets": "live", "seeds": [0]},
        },
    }


def run(tmp_path: Path, settings: dict[str, Any], *options: str) -> subprocess.CompletedProcess:
    (tmp_path / "study.json").write_text(json.dumps(settings))
    return scripts.run("study.py", "--config", tmp_path / "study.json", *options)


@pytest.mark.slow
def test_study_does_only_what_is_missing(tmp_path: Path, settings: dict[str, Any]) -> None:
    done = run(tmp_path, settings, "--only", "[ce]", "--seeds", "[0]")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "study"
    assert not (output / "dumps").exists(), "cross-entropy on the domain needs no dump"
    first = output / "runs" / "ce-lr0.001-seed0"
    before = (first / "measures.json").stat().st_mtime_ns
    (first / "measures.json").rename(first / "kept.json")  # as if killed before measuring
    trained = (first / "summary.json").read_text()

    done = run(tmp_path, settings)
    assert done.returncode == 0, done.stderr
    assert (first / "summary.json").read_text() == trained
    assert (first / "measures.json").stat().st_mtime_ns > before
    assert json.loads((first / "measures.json").read_text()) == json.loads(
        (first / "kept.json").read_text()
    )
    results = json.loads((output / "results.json").read_text())
    runs = results["runs"]
    assert len(runs) == 7
    arms = {of["arm"]: of for of in results["arms"]}
    assert list(arms) == ["half", "ce", "mol", "live"]
    check_numbers(results, arms)
    # A dump of the whole vocabulary teaches the same as the live teacher, up to the codec.
    stored, live = (runs[f"{arm}-lr0.001-seed0"] for arm in ("mol", "live"))
    assert stored["curve"]["ce"] == pytest.approx(live["curve"]["ce"], rel=1e-3)
    assert stored["curve"]["kl"] == pytest.approx(live["curve"]["kl"], rel=2e-2, abs=2e-4)
    assert stored["curve"]["step"] == [0, 2, 3]
    for kind in ("domain", "general", "other"):  # the same sequences as in the measures
        assert stored["curve"][kind][-1] == pytest.approx(stored[kind]["perplexity"], rel=1e-4)
    assert runs["ce-lr0.001-seed0"]["curve"]["ce"][0] != runs["ce-lr0.001-seed1"]["curve"]["ce"][0]
    assert f"{arms['mol']['domain_perplexity']['mean']:.2f} ± " in done.stdout
    assert "| other's KL(base‖m) |" in done.stdout

    refused = run(tmp_path, settings, "--general.skip", "7", "--only", "[mol]")
    assert refused.returncode == 3
    assert "skip" in refused.stderr
    settings["arms"]["ce"]["train"]["training"] = {"max_steps": 4}
    refused = run(tmp_path, settings)
    assert refused.returncode == 3
    assert "max_steps" in refused.stderr


def check_numbers(results: dict[str, Any], arms: dict[str, Any]) -> None:
    base = results["base"]
    values = [of["general"]["perplexity"] for of in results["runs"].values() if of["arm"] == "mol"]
    found = arms["mol"]["general_perplexity"]
    assert found["mean"] == pytest.approx(sum(values) / 2)
    assert found["sd"] == pytest.approx(statistics.stdev(values))
    assert arms["live"]["general_perplexity"]["sd"] is None
    one = results["runs"]["ce-lr0.001-seed1"]
    gain = math.log(base["domain"]["perplexity"]) - math.log(one["domain"]["perplexity"])
    assert one["domain_gain"] == pytest.approx(gain)
    assert one["domain_gain"] > 0.01
    assert arms["ce"]["domain_gain"]["mean"] > arms["half"]["domain_gain"]["mean"] > 0
    assert base["general_loss"] == base["other_loss"] == 0
    loss = math.log(one["other"]["perplexity"] / base["other"]["perplexity"])
    assert one["other_loss"] == pytest.approx(loss)
    assert one["other_forward_kl"] == one["other"]["forward_kl"] > 0


def test_text_of_another_source_is_optional() -> None:
    measured = {"perplexity": 9.0, "forward_kl": 0.1, "reverse_kl": 0.2, "top1_agreement": 0.9}
    kinds = {"domain": measured, "general": measured, "other": measured}
    results = study.collect(config(), {}, kinds)
    assert "| other's loss | other's KL(base‖m) | other's KL(m‖base) |" in study.table(results)
    del kinds["other"]
    assert "other" not in study.table(study.collect(config(), {}, kinds))


def config(**changes: Any) -> StudyConfig:
    text = CorpusConfig("text.jsonl")
    given: dict[str, Any] = {
        "model": "m",
        "domain": text,
        "general": text,
        "held_out": HeldOutConfig(text, text),
        "output": "out",
        "arms": {"ce": ArmConfig(train={"mix": 0}), "mol": ArmConfig()},
        "dumps": {"small": {"k": 8}, "given": "elsewhere"},
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-4],
    }
    return StudyConfig(**given | changes)


def test_plan_is_arms_times_rates_times_seeds() -> None:
    arms = {
        "half": ArmConfig(interpolate="ce", seeds=[1], learning_rates=[1e-3]),
        "ce": ArmConfig(train={"mix": 0}),
        "mol": ArmConfig(dump="given", train={"training": {"weight_decay": 0.1}}),
    }
    runs = list(
        study.plan(config(arms=arms, train={"loss": {"alpha": 2}}, training={"max_steps": 5}))
    )
    assert [one.name for one in runs] == [
        "ce-lr0.001-seed0",
        "ce-lr0.0001-seed0",
        "mol-lr0.001-seed0",
        "mol-lr0.0001-seed0",
        "ce-lr0.001-seed1",
        "ce-lr0.0001-seed1",
        "mol-lr0.001-seed1",
        "mol-lr0.0001-seed1",
        "half-lr0.001-seed1",
    ]
    training = runs[3].settings["training"]
    assert training["max_steps"] == 5
    assert training["weight_decay"] == 0.1
    assert (training["learning_rate"], training["seed"]) == (1e-4, 0)
    assert runs[3].settings["loss"] == {"alpha": 2}
    assert runs[3].settings["dump"] == "elsewhere"
    assert "dump" not in runs[0].settings


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"only: 'x' is not one of ce, mol"):
        config(only=["x"])
    with pytest.raises(ConfigError, match=r"arms\.a\.dump"):
        config(arms={"a": ArmConfig(dump="x")})
    with pytest.raises(ConfigError, match=r"not an arm that is trained"):
        config(arms={"a": ArmConfig(interpolate="x")})
    with pytest.raises(ConfigError, match="held_out"):
        config(held_out=HeldOutConfig())


def test_dumps_with_mistakes_are_found_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not remembered: the mended settings are taken."""
    wrong = {"k": 8, "corpus": {"limit": 3}}
    found = config(output=str(tmp_path), dumps={"small": wrong, "given": "elsewhere"})
    with pytest.raises(ConfigError, match="dump small"):
        study.parse_dump(found, "small")
    assert "corpus.path" in capsys.readouterr().err
    study.parse_dump(found, "given")
    mended = config(output=str(tmp_path), dumps={"small": {"k": 8}})
    study.parse_dump(mended, "small")


def test_a_dump_that_was_begun_keeps_its_settings(tmp_path: Path) -> None:
    study.parse_dump(config(output=str(tmp_path)), "small")
    (tmp_path / "dumps" / "small").mkdir()
    with pytest.raises(RefusedError, match="k: 8"):
        study.parse_dump(config(output=str(tmp_path), dumps={"small": {"k": 9}}), "small")


def test_only_a_run_that_was_begun_keeps_its_settings(tmp_path: Path) -> None:
    study.check_same(tmp_path / "run", {"steps": 1})
    study.check_same(tmp_path / "run", {"steps": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / study.RUN).write_text('{"steps": 1}')
    with pytest.raises(RefusedError, match="steps"):
        study.check_same(tmp_path / "run", {"steps": 2})


def refused_before_work(tmp_path: Path, model_path: Path, **changes: Any) -> str:
    """Why a study is refused before anything is measured or trained."""
    given = {"model": str(model_path), "output": str(tmp_path / "o"), "dumps": {}, "seeds": [0]}
    with pytest.raises((ConfigError, RefusedError)) as refused:
        study.run(config(**given | changes))
    assert not (tmp_path / "o" / "base" / "measures.json").exists()
    assert not list((tmp_path / "o" / "runs").glob("*/metrics.jsonl"))
    return str(refused.value)


CE = ArmConfig(train={"mix": 0})


def test_mistakes_in_later_runs_are_found_before_work(tmp_path: Path, model_path: Path) -> None:
    typo = ArmConfig(train={"mix": 0, "training": {"max_step": 5}})
    found = refused_before_work(tmp_path, model_path, arms={"ce": CE, "typo": typo})
    assert "training.max_step: no such argument" in found
    half = ArmConfig(interpolate="ce", seeds=[1])
    found = refused_before_work(tmp_path, model_path, arms={"ce": CE, "half": half})
    assert "half-lr0.001-seed1: ce-lr0.001-seed1 is not finished" in found


def test_an_interpolation_needs_no_dump(tmp_path: Path, model_path: Path) -> None:
    """Neither to be checked, nor to be made."""
    half = ArmConfig(interpolate="ce")
    found = config(model=str(model_path), output=str(tmp_path), arms={"ce": CE, "half": half})
    assert study.needed_dumps(found, list(study.plan(found))) == []
    without = config(
        model=str(model_path), output=str(tmp_path), dumps={}, arms={"ce": CE, "half": half}
    )
    runs = list(study.plan(without))
    study.Study(without).check(runs, runs)


def test_finished_runs_of_other_arms_are_in_the_results_too(
    tmp_path: Path, model_path: Path
) -> None:
    """So `only` does not hide that they were made with other settings."""
    other = tmp_path / "o" / "runs" / "ce-lr0.001-seed0"
    other.mkdir(parents=True)
    (other / study.RUN).write_text('{"steps": 1}')
    arms = {"ce": CE, "new": CE}
    found = refused_before_work(tmp_path, model_path, arms=arms, only=["new"])
    assert "ce-lr0.001-seed0 holds a run with other settings" in found


@pytest.mark.slow
def test_tasks_are_added_to_a_finished_study(
    tmp_path: Path, settings: dict[str, Any], model_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs mol-distill[tasks]")
    settings |= {"arms": {"ce": {"train": {"mix": 0}}}, "seeds": [0, 1], "dumps": {}}
    assert run(tmp_path, settings).returncode == 0
    runs = tmp_path / "study" / "runs"
    trained = [(runs / f"ce-lr0.001-seed{seed}" / "summary.json").read_text() for seed in (0, 1)]
    file = write_questions(tmp_path / "q.jsonl", 20)
    settings["tasks"] = {"asked": {"path": str(file)}}
    done = run(tmp_path, settings)
    assert done.returncode == 0, done.stderr
    assert trained == [
        (runs / f"ce-lr0.001-seed{seed}" / "summary.json").read_text() for seed in (0, 1)
    ]
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    one, (arm,) = results["runs"]["ce-lr0.001-seed0"], results["arms"]
    assert one["all_tasks"]["questions"] == 20
    assert arm["tasks_kept"]["mean"] == pytest.approx(arm["all_tasks"]["kept_share"])
    assert "| tasks right | tasks kept |" in done.stdout
    rows = (runs / "ce-lr0.001-seed0" / "tasks" / "asked.jsonl").read_text().splitlines()
    assert sum(json.loads(row)["scores"]["acc"] for row in rows) == one["all_tasks"]["right"]
    text, _ = report.make(str(tmp_path / "study"))
    assert "questions that the base answered" in text
