"""A student that diverged is never saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.training import train
from pipeline.training.output import COMPLETE
from pipeline.training.trainer import DistillTrainer
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.runs import settings


@pytest.fixture
def run(tmp_path: Path, model_path: Path) -> Any:
    """Train without logging a step, so that nothing but the check itself looks at the losses."""
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(12)])

    def of(trainer: Any = DistillTrainer, **training: Any) -> Any:
        training = {"logging_steps": 1000, "max_steps": 4, "max_grad_norm": 0.0} | training
        config = settings(
            tmp_path, model_path, None, domain, mix=0, max_length=64, training=training
        )
        return train.run(config, trainer)

    return of


class Spoilt(DistillTrainer):
    """Makes the loss of step 2 infinite, and of that step alone; the weights stay good."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        return loss + torch.inf if self.state.global_step == 1 else loss


class Broken(DistillTrainer):
    """Breaks the weights in its last step, whose loss was still good."""

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        if self.state.global_step == self.state.max_steps - 1:
            next(self.model.parameters()).grad.fill_(torch.nan)
        return loss


@pytest.mark.parametrize(
    ("trainer", "learning_rate"), [(DistillTrainer, 1e30), (Broken, 1e-3), (Spoilt, 1e-3)]
)
def test_no_model_is_left(run: Any, tmp_path: Path, trainer: Any, learning_rate: float) -> None:
    with pytest.raises(ConfigError, match=r"the loss is not finite.*max_grad_norm"):
        run(trainer, learning_rate=learning_rate)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_checkpoints_from_before_are_kept_and_none_is_made_after(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="step 2: the loss is not finite"):
        run(Spoilt, save_strategy="steps", save_steps=1)
    found = [path.parent.name for path in (tmp_path / "run").glob(f"*/{COMPLETE}")]
    assert found == ["checkpoint-1"]


def test_the_device_is_not_asked_at_each_step(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    check = DistillTrainer.check_finite
    monkeypatch.setattr(DistillTrainer, "check_finite", lambda self: looks.append(1) or check(self))
    run(max_steps=6)
    assert len(looks) == 1


def test_an_infinite_perplexity_is_logged_as_strict_json(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.config import CorpusConfig, HeldOutConfig
    from pipeline.evaluation.measures import Sums

    monkeypatch.setattr(Sums, "nll", property(lambda self: 1e9))
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    config = settings(
        tmp_path, model_path, None, domain, mix=0, max_length=64, training={"max_steps": 1}
    )
    config.training["eval_strategy"] = "steps"
    config.held_out = HeldOutConfig(domain=CorpusConfig(str(domain)))
    train.run(config)
    for name in ("metrics.jsonl", "summary.json"):
        text = (tmp_path / "run" / name).read_text()
        assert '"eval_domain_perplexity": "Infinity"' in text
        for line in text.splitlines() if name == "metrics.jsonl" else [text]:
            json.loads(line, parse_constant=pytest.fail)
