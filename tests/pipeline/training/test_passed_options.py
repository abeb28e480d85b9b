"""Options of transformers, which pass through `training`."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import CorpusConfig, HeldOutConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.training import train
from pipeline.training.arguments import training_arguments
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.runs import assert_close, settings, steps


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(12)])


@pytest.fixture
def run(tmp_path: Path, model_path: Path, dump_path: Path, domain: Path) -> Any:
    def of(name: str, **training: Any) -> TrainConfig:
        training = {"max_steps": 8, **training}
        output = str(tmp_path / name)
        config = settings(tmp_path, model_path, dump_path, domain, output=output, training=training)
        config.held_out = HeldOutConfig(domain=CorpusConfig(str(domain)), dump=str(dump_path))
        config.gradient_cosine_steps = 4
        return config

    return of


def test_gradient_checkpointing_learns_the_same(run: Any) -> None:
    plain, checkpointed = run("plain"), run("checkpointed", gradient_checkpointing=True)
    train.run(plain)
    train.run(checkpointed)
    assert_close(steps(checkpointed.output), steps(plain.output))


def test_bf16_stays_near_float32_with_exact_losses(run: Any) -> None:
    """Autocast rounds matrix products; targets, softmax and sums stay float32."""
    plain, half = run("plain"), run("half", bf16=True)
    train.run(plain)
    null_kl = train.run(half)["null_test_kl"]
    assert null_kl < 2e-3
    for one, other in zip(steps(half.output), steps(plain.output), strict=True):
        assert one["ce"] == pytest.approx(other["ce"], rel=2e-3)
        assert one["kl"] == pytest.approx(other["kl"], rel=0.05, abs=2e-3)
        assert one["ce"] != other["ce"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # traces all that inductor compiles
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_learns_the_same(run: Any, backend: str) -> None:
    compiled = run("compiled", torch_compile=True, torch_compile_backend=backend)
    plain = run("plain")
    train.run(plain)
    summary = train.run(compiled)
    assert_close(steps(compiled.output), steps(plain.output))
    assert summary["steps"] == 8


def test_metrics_reach_tensorboard(run: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run("run", report_to="tensorboard", eval_strategy="steps", eval_steps=4)
    train.run(config)
    found = EventAccumulator(str(next(Path(config.output).rglob("events.out*")).parent)).Reload()
    shown = set(found.Tags()["scalars"])
    names = "loss ce kl teacher_tail grad_norm learning_rate domain_tokens general_tokens"
    names += " tokens_per_s wait_share ce_grad_norm kl_grad_norm grad_cosine"
    assert {f"train/{name}" for name in names.split()} <= shown
    assert {"eval/domain_perplexity", "eval/general_kl"} <= shown


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="it is installed")
def test_a_missing_reporter_is_named(run: Any) -> None:
    with pytest.raises(ConfigError, match="pip install wandb"):
        train.run(run("run", report_to="wandb"))


def test_compile_with_fsdp_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="torch_compile does not work with FSDP"):
        training_arguments(run("run", torch_compile=True))


@pytest.mark.skipif(
    importlib.util.find_spec("grokadamw") is not None, reason="the package is installed"
)
def test_an_optimizer_that_is_not_installed_is_refused(run: Any) -> None:
    training_arguments(run("here", optim="adafactor"))
    with pytest.raises(ConfigError, match=r"training\.optim .*install grokadamw"):
        training_arguments(run("missing", optim="grokadamw"))
