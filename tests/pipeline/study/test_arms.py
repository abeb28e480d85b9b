"""The trainer and the changes of an arm, and students between the base and another student."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.losses import sparse_divergence
from pipeline.models.directory import ModelFolder
from pipeline.study import arms, targets
from pipeline.study.config import ArmConfig
from pipeline.training import train
from pipeline.training.output import Output
from pipeline.training.trainer import DistillTrainer
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model
from tests.helpers.rows import mixed_row
from tests.helpers.runs import settings, steps


def test_an_arm_makes_its_changes_in_order(model_path: Path, dump_path: Path) -> None:
    row = mixed_row(dump_path)
    arm = ArmConfig(targets="renormalised", k=2, domain=False)
    for change in targets.retargets(arm):
        row = change(row)
    p, ids = row["targets"]["logprobs"].exp(), row["targets"]["ids"]
    assert ids.shape == (len(row["targets"]["rows"]), 2)
    torch.testing.assert_close(p.sum(1), torch.ones(len(p)))
    assert arms.trainer_of(ArmConfig(), ModelFolder(model_path)) is DistillTrainer
    uniform = torch.zeros(len(p), 512)
    loss = sparse_divergence(uniform, ids.long(), p.log(), row["targets"]["tail_logprob"])
    assert (loss > 0).all()


def test_interpolation_is_linear_in_the_weights(tmp_path: Path, model_path: Path) -> None:
    student = tiny_model(tmp_path / "student", seed=3)
    output = Output(tmp_path / "mixed", {})
    arms.interpolate(ModelFolder(model_path), ModelFolder(student), 0.25, output)
    base, other, mixed = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (model_path, student, tmp_path / "mixed" / "model")
    )
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, 0.75 * base[name] + 0.25 * other[name])


@pytest.mark.parametrize(
    "arm",
    [
        ArmConfig(),
        ArmConfig(k=1),
        ArmConfig(targets="renormalised"),
        ArmConfig(targets="live"),
        ArmConfig(domain=False),
    ],
    ids=["stored", "k", "renormalised", "live", "general alone"],
)
def test_gradients_are_those_of_the_arm(
    tmp_path: Path, model_path: Path, dump_path: Path, arm: ArmConfig
) -> None:
    """The two parts add up to the gradient of the step, whose norm transformers logs. To measure
    them changes no logged loss."""
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(4))
    student = tiny_model(tmp_path / "student", seed=5)
    logged = []
    for every in (0, 1):
        training = {"max_steps": 1, "max_grad_norm": 1e9}
        config = settings(
            tmp_path, student, dump_path, domain, training=training,
            gradient_cosine_steps=every, output=str(tmp_path / str(every)),
        )  # fmt: skip
        train.run(config, arms.trainer_of(arm, ModelFolder(model_path)))
        logged += steps(tmp_path / str(every))
    plain, found = logged
    ce, kl = found.pop("ce_grad_norm"), found.pop("kl_grad_norm")
    both = ce**2 + kl**2 + 2 * found.pop("grad_cosine", 0) * ce * kl
    assert both**0.5 == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert found == plain
