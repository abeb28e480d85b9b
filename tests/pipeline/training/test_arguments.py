"""Every one of transformers.TrainingArguments has an effect, or is refused with the reason."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from pipeline.config import CorpusConfig, HeldOutConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.training import arguments
from pipeline.training.argument_table import FIXED, HONOURED, REFUSED
from pipeline.training.arguments import check_dtype, training_arguments
from tests.helpers.paths import ROOT
from tests.helpers.runs import settings

PARAMETERS = inspect.signature(TrainingArguments).parameters

HARDWARE = {"tf32", "fsdp", "fsdp_config", "ddp_backend"}
"""Need a GPU or several processes (test_fsdp.py)."""
OTHER: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "optim": "sgd",
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "optim_args": "momentum=0.9",
    "optim_target_modules": "all-linear",
    "neftune_noise_alpha": 5.0,
    "data_seed": 3,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "torch_empty_cache_steps": 5,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "logging_strategy": "epoch",
    "log_level": "info",
    "log_level_replica": "info",
    "report_to": ["tensorboard"],
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "metric_for_best_model": "eval_domain_perplexity",
    "greater_is_better": True,
    "dataloader_prefetch_factor": 3,
    "dataloader_multiprocessing_context": "spawn",
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 9,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "debug": "underflow_overflow",
}
"""Values where changing the default's type or size is not enough."""
WITH: dict[str, Any] = {
    "optim_args": {"optim": "sgd"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
    "optim_target_modules": {"optim": "galore_adamw"},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {
        "metric_for_best_model": "eval_domain_perplexity",
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
    },
}
"""What else an argument needs."""


def other_than(name: str) -> Any:
    """A value that is not the default."""
    default = PARAMETERS[name].default
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return "something"


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., TrainConfig]:
    def of(**training: Any) -> TrainConfig:
        config = settings(tmp_path, Path("m"), None, Path("d.jsonl"), mix=0, max_length=64)
        config.held_out = HeldOutConfig(domain=CorpusConfig("d.jsonl"))
        return replace(config, training={"report_to": "none", **training})

    return of


def test_every_argument_has_one_place() -> None:
    """A new release of transformers: find out what a new argument does here, and say so."""
    places = [*HONOURED, *FIXED, *REFUSED]
    assert len(places) == len(set(places))
    assert set(places) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(HONOURED - HARDWARE))
def test_honoured(
    config_of: Callable[..., TrainConfig], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "optim_target_modules":  # for optimizers of packages that are not installed here
        monkeypatch.setattr(arguments.probes, "check", lambda args: None)
    value = other_than(name)
    found = getattr(training_arguments(config_of(**WITH.get(name, {}), **{name: value})), name)
    assert found == value or str(getattr(found, "value", found)) == str(value) or value in found


CLASS = {"class_path": "os.system", "init_args": {"command": "true"}}
ODD = [None, CLASS, [1], "", "x", -1, 1.5, {"a": None}, [{"a": 1}], True, math.nan, "1e400"]


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_any_value_is_taken_or_refused_by_name(
    config_of: Callable[..., TrainConfig], name: str
) -> None:
    for value in ODD:
        refused = ""
        try:
            training_arguments(config_of(**WITH.get(name, {}), **{name: value}))
        except ConfigError as error:
            refused = str(error)
        named = refused.split(":")[0]
        assert not refused or any(each in named for each in (name, *WITH.get(name, {})))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim_args": CLASS}, "training.optim_args: expected str, found {'class_path': "),
        ({"lr_scheduler_kwargs": CLASS}, "training.lr_scheduler_kwargs {"),
        ({"gradient_checkpointing_kwargs": {"a": 1}}, "training.gradient_checkpointing_kwargs "),
        ({"dataloader_multiprocessing_context": "x", "dataloader_num_workers": 1}, "'fork'"),
        ({"dataloader_persistent_workers": True}, "needs num_workers > 0"),
        ({"log_level": "x"}, "training.log_level"),
        ({"metric_for_best_model": 5}, "training.metric_for_best_model: expected str, found 5"),
        ({"report_to": {"a": 1}}, "training.report_to: expected str or list[str], found "),
        ({"max_steps": 1.5}, "training.max_steps: expected int, found 1.5"),
        ({"warmup_steps": "soon"}, "training.warmup_steps: expected float, found 'soon'"),
        ({"learning_rate": None}, "training.learning_rate: expected float, found None"),
        ({"save_strategy": "often"}, "training.save_strategy: "),
        ({"torch_compile_backend": "x"}, "training.torch_compile_backend x: "),
        ({"ddp_bucket_cap_mb": 0}, "training.ddp_bucket_cap_mb: at least 1, found 0"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "training.optim sgd, optim_args momentum=x"),
        ({"optim_args": "a=b"}, "optim_args change nothing of this optimizer"),
    ],
)
def test_the_argument_is_named(
    config_of: Callable[..., TrainConfig], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        training_arguments(config_of(**given))


def test_text_that_spells_a_number_is_one(config_of: Callable[..., TrainConfig]) -> None:
    args = training_arguments(config_of(learning_rate="1e-5", warmup_steps="3", max_steps=7.0))
    assert (args.learning_rate, args.warmup_steps, args.max_steps) == (1e-5, 3, 7)


@pytest.mark.parametrize("name", [*FIXED, *REFUSED])
def test_refused_with_the_reason(config_of: Callable[..., TrainConfig], name: str) -> None:
    reason = {**FIXED, **REFUSED}[name]
    with pytest.raises(ConfigError, match=f"^training.{name}: ") as refusal:
        training_arguments(config_of(**{name: other_than(name)}))
    assert str(refusal.value).endswith(reason)


@pytest.mark.parametrize("name", REFUSED)
def test_a_default_is_accepted(config_of: Callable[..., TrainConfig], name: str) -> None:
    default = PARAMETERS[name].default
    training_arguments(config_of(**{name: [] if name == "include_for_metrics" else default}))


def test_the_page_lists_what_is_refused() -> None:
    page = (ROOT / "pipeline" / "training" / "README.md").read_text()
    section = page.split("## TrainingArguments")[1].split("\n## ")[0]
    for name, reason in {**FIXED, **REFUSED}.items():
        line = next(line for line in section.splitlines() if f"`{name}`" in line)
        assert line.endswith(f"| {reason} |"), name
    assert not [name for name in HONOURED if f"`{name}`" in section]


@pytest.mark.parametrize("launched", ["no", "bf16", "fp16", "fp8"])
def test_the_launchers_precision_counts_as_a_setting(
    config_of: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, launched: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)  # as accelerate's launcher does
    assert training_arguments(config_of(bf16=True)).bf16
    if launched in ("no", "bf16"):
        assert training_arguments(config_of()).bf16 == (launched == "bf16")
        return
    with pytest.raises(ConfigError, match=f"--mixed_precision {launched}`: expected bf16 or no"):
        training_arguments(config_of())


def test_weights_in_float16_need_bf16(config_of: Callable[..., TrainConfig]) -> None:
    plain, bf16 = (training_arguments(config_of(bf16=bf16)) for bf16 in (False, True))
    check_dtype(plain, "float32")
    check_dtype(plain, "bfloat16")
    check_dtype(bf16, "float16")
    with pytest.raises(ConfigError, match=r"dtype auto: the model's own is float16.*set dtype"):
        check_dtype(plain, "float16")


@pytest.mark.parametrize(
    ("dump", "workers"), [("dump", 0), ("s3://bucket/dump", 2), ({"here": 1, "s3://a/b": 2}, 2)]
)
def test_a_remote_dump_is_read_by_workers(dump: Any, workers: int) -> None:
    """They request the rows of the next steps while this one is computed."""
    config = replace(settings(Path("x"), Path("x"), Path("x"), Path("x")), dump=dump)
    assert arguments.defaults(config)["dataloader_num_workers"] == workers
