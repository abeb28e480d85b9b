"""Every one of transformers.TrainingArguments has an effect, or is refused with the reason."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from pipeline.config import CorpusConfig, HeldOutConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.training import arguments
from pipeline.training.argument_table import FIXED, HONOURED, REFUSED
from pipeline.training.arguments import training_arguments
from tests.helpers.paths import ROOT
from tests.helpers.runs import settings

PARAMETERS = inspect.signature(TrainingArguments).parameters

HARDWARE = {"fp16", "tf32", "fsdp", "fsdp_config", "ddp_backend"}
"""Need a GPU or several processes (test_fsdp.py)."""
OTHER: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "optim": "sgd",
    "optim_args": "foreach=true",
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
        config.training = {"report_to": "none", **training}
        return config

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
        monkeypatch.setattr(arguments, "check_optimizer", lambda args: None)
    value = other_than(name)
    found = getattr(training_arguments(config_of(**WITH.get(name, {}), **{name: value})), name)
    assert found == value or str(getattr(found, "value", found)) == str(value) or value in found


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
