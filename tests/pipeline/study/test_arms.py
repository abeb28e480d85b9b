"""The trainer and the changes of an arm, and students between the base and another student."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pipeline.losses import sparse_divergence
from pipeline.models.directory import ModelFolder
from pipeline.study import arms, targets
from pipeline.study.config import ArmConfig
from pipeline.training.output import Output
from pipeline.training.trainer import DistillTrainer
from tests.helpers.models import tiny_model
from tests.helpers.rows import mixed_row


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
