"""The control arms' targets, against what they stand for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.data.packing import PackedRow, domain_part, general_part, pack_row, with_targets
from pipeline.losses import Direction, sparse_divergence
from pipeline.models.attention import enable_packing
from pipeline.models.directory import ModelFolder
from pipeline.study import arms, live_teacher, targets
from pipeline.study.config import ArmConfig
from pipeline.training.forward import add_distill_forward
from pipeline.training.trainer import DistillTrainer
from storage import LogitDataset
from tests.helpers.models import tiny_model


@pytest.fixture
def row(dump_path: Path) -> PackedRow:
    dump = LogitDataset(dump_path)
    domain = [dump[5].input_ids[:30], dump[6].input_ids[:20]]
    return pack_row(domain, [dump[1], dump[2]])


def losses(model: Path, row: PackedRow) -> tuple[int, torch.Tensor]:
    """(rows scored by cross-entropy, the trainer's losses of all rows)"""
    student = AutoModelForCausalLM.from_pretrained(model)
    add_distill_forward(student, "forward")
    weights = torch.ones(len(row["targets"]["rows"]))
    with torch.no_grad():
        found = student(**with_targets(row, row_weights=weights))
    return len(row["targets"]["labels"]), found["losses"]


def alone(model: Path, ids: np.ndarray) -> torch.Tensor:
    """[P, V] log-probabilities of one sequence by itself, in float64."""
    loaded = AutoModelForCausalLM.from_pretrained(model).double()
    with torch.no_grad():
        logits = loaded(torch.from_numpy(ids[None].astype(np.int64))).logits
    return logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_live_is_the_full_divergence(
    tmp_path: Path,
    model_path: Path,
    dump_path: Path,
    direction: Direction,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses and gradients in float64 against autograd on each sequence by itself."""
    monkeypatch.setattr(live_teacher, "ROWS", 40)
    student = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "student", seed=3))
    teacher = AutoModelForCausalLM.from_pretrained(model_path)
    dump = LogitDataset(dump_path)
    row = pack_row([], [dump[1], dump[2]])
    hidden, known = [], []
    for model in (student.double(), teacher.double()):
        enable_packing(model)
        hidden.append(live_teacher.decode(model, row)[row["targets"]["rows"]])
        known.append(model.lm_head.weight)
    found = live_teacher.full_divergence(hidden[0], known[0], hidden[1], known[1], direction)
    found.sum().backward()
    gradients = {name: w.grad.clone() for name, w in student.named_parameters()}
    student.zero_grad()
    expected = []
    for index in (1, 2):
        ids = torch.from_numpy(dump[index].input_ids[None].astype(np.int64))
        p, q = (model(ids).logits[0, :-1].log_softmax(1) for model in (teacher, student))
        p = p.detach()
        over = p.exp() * (p - q) if direction == "forward" else q.exp() * (q - p)
        expected.append(over.sum(1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-10)
    torch.cat(expected).sum().backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-6, atol=1e-9)


def test_halves_of_a_row_are_the_whole(tmp_path: Path, row: PackedRow) -> None:
    student = tiny_model(tmp_path / "student", seed=3)
    domain, expected = losses(student, row)
    _, first = losses(student, domain_part(row))
    _, second = losses(student, general_part(row))
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-4, atol=1e-5)
    assert len(first) == domain


def test_labels_are_cross_entropy_on_all(tmp_path: Path, dump_path: Path, row: PackedRow) -> None:
    student = tiny_model(tmp_path / "student", seed=3)
    scored, found = losses(student, targets.labels(row))
    assert scored == len(found) == len(row["targets"]["rows"])
    dump = LogitDataset(dump_path)
    sequences = [dump[5].input_ids[:30], dump[6].input_ids[:20], dump[1].input_ids]
    expected = [
        -alone(student, ids).gather(1, torch.from_numpy(ids[1:, None].astype(np.int64)))[:, 0]
        for ids in [*sequences, dump[2].input_ids]
    ]
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_cut_moves_the_rest_to_the_tail(row: PackedRow) -> None:
    stored = row["targets"]
    found = targets.cut(row, 3)["targets"]
    assert found["ids"].tolist() == stored["ids"][:, :3].tolist()
    rest = stored["tail_logprob"].double().exp() + stored["logprobs"][:, 3:].double().exp().sum(1)
    torch.testing.assert_close(found["tail_logprob"].double(), rest.log(), rtol=1e-5, atol=1e-6)
    assert targets.cut(row, 8) is row


def test_renormalised_has_no_tail_and_drifts(model_path: Path, row: PackedRow) -> None:
    """Where the student is the teacher, the loss is -log of the mass held, not 0."""
    found = targets.renormalised(row)["targets"]
    assert (found["tail_logprob"] == -torch.inf).all()
    torch.testing.assert_close(found["logprobs"].exp().sum(1), torch.ones(len(found["ids"])))
    domain, at_base = losses(model_path, targets.renormalised(row))
    _, with_tail = losses(model_path, row)
    held = row["targets"]["logprobs"].exp().sum(1)
    torch.testing.assert_close(at_base[domain:], -held.log(), rtol=0, atol=1 / 16)  # the codec
    assert at_base[domain:].mean() > 100 * with_tail[domain:].mean()


def test_without_the_domain_the_general_losses_stay(tmp_path: Path, row: PackedRow) -> None:
    student = tiny_model(tmp_path / "student", seed=3)
    found = general_part(row)
    assert found["sequence_lengths"] == row["sequence_lengths"][2:]
    assert found["position_ids"][0, 0] == 0
    domain, expected = losses(student, row)
    scored, general = losses(student, found)
    assert scored == 0
    torch.testing.assert_close(general, expected[domain:], rtol=1e-4, atol=1e-5)


def test_without_either_part_there_is_no_loss(dump_path: Path) -> None:
    row = pack_row([LogitDataset(dump_path)[5].input_ids[:30]], [])
    assert len(general_part(row)["targets"]["rows"]) == 0


def test_changes_go_one_after_the_other(model_path: Path, row: PackedRow) -> None:
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
    arms.interpolate(ModelFolder(model_path), ModelFolder(student), 0.25, tmp_path / "mixed")
    base, other, mixed = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (model_path, student, tmp_path / "mixed")
    )
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, 0.75 * base[name] + 0.25 * other[name])
