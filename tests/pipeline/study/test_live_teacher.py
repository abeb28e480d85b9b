"""The live teacher's divergence, against autograd on full logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.data.mixing import GeneralStream
from pipeline.data.packing import general_part, pack_row
from pipeline.losses import Direction, sparse_divergence
from pipeline.models.attention import enable_packing
from pipeline.models.directory import ModelFolder
from pipeline.study import live_teacher
from pipeline.study.arms import trainer_of
from pipeline.study.config import ArmConfig
from pipeline.training import train
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.losses import both
from tests.helpers.masks import MaskedDataset, give_masks
from tests.helpers.models import tiny_model
from tests.helpers.rows import mixed_sequences
from tests.helpers.runs import settings


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_live_is_the_full_divergence(
    tmp_path: Path,
    model_path: Path,
    dump_path: Path,
    direction: Direction,
    with_masks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses and gradients in float64, compared with autograd on each sequence alone."""
    monkeypatch.setattr(live_teacher, "ROWS", 40)
    student = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "student", seed=3))
    teacher = AutoModelForCausalLM.from_pretrained(model_path)
    domain, general = mixed_sequences(dump_path, with_masks)
    row = general_part(pack_row(domain, general))
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
    for record in general:
        ids = torch.from_numpy(record.input_ids[None].astype(np.int64))
        logits = (model(ids).logits[0, record.positions] for model in (teacher, student))
        p, q = (each.log_softmax(1) for each in logits)
        p = p.detach()
        over = p.exp() * (p - q) if direction == "forward" else q.exp() * (q - p)
        expected.append(over.sum(1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-10)
    torch.cat(expected).sum().backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-6, atol=1e-9)


def test_a_step_learns_targets_alone(
    tmp_path: Path, model_path: Path, dump_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logged KL is the mean over the targets, from logits of each sequence alone."""
    give_masks(monkeypatch)
    student = tiny_model(tmp_path / "student", seed=5)
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(4))
    config = settings(tmp_path, student, dump_path, domain, training={"max_steps": 1})
    live = ArmConfig(targets="live")
    summary = train.run(config, trainer_of(live, ModelFolder(model_path)))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (model_path, student)]
    kl = []
    for record in GeneralStream([MaskedDataset(dump_path)], [1], 42).records(range(2)):
        ids = torch.from_numpy(record.input_ids[None].astype(np.int64))
        with torch.no_grad():
            p, q = (each(ids).logits[0, record.positions].log_softmax(1) for each in models)
        kl.append((p.exp() * (p - q)).sum(1))
    assert summary["general_tokens"] == len(torch.cat(kl))
    assert summary["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("width", [9, 12, 16])
def test_heads_of_other_widths(direction: Direction, width: int) -> None:
    """A wider student has the loss of a dump that kept every id of the teacher; a narrower one that
    of a teacher whose padding, which has no mass, is cut off."""
    torch.manual_seed(0)
    teacher_hidden, teacher_weight = torch.randn(6, 12).double(), torch.eye(12).double()
    if width < 12:
        teacher_hidden[:, width:] = -700.0
    hidden, weight = torch.randn(6, 5).double(), torch.randn(width, 5).double()
    for each in (hidden, weight):
        each.requires_grad_()
    logprobs, ids = (teacher_hidden @ teacher_weight.T).log_softmax(1).topk(min(width, 12))
    none = torch.full((6,), -torch.inf).double()
    expected = sparse_divergence(hidden @ weight.T, ids, logprobs, none, direction)
    wanted = torch.autograd.grad(expected.sum(), [hidden, weight])
    found = live_teacher.full_divergence(hidden, weight, teacher_hidden, teacher_weight, direction)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-12)
    found.sum().backward()
    for each, gradient in zip((hidden, weight), wanted, strict=True):
        torch.testing.assert_close(each.grad, gradient, rtol=1e-9, atol=1e-11)


@both
@pytest.mark.parametrize("autocast", [True, False])
def test_divergence_on_a_gpu(direction: Direction, autocast: bool) -> None:
    """Devices and dtypes fit, and the host waits for no value."""
    with fake_cuda() as mode:
        hidden, weight = (torch.empty(n, 16, device="cuda", requires_grad=True) for n in (9, 50))
        teacher = [torch.empty(n, 16, device="cuda") for n in (9, 45)]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            losses = live_teacher.full_divergence(hidden, weight, *teacher, direction)
        (losses.sum() / 9).backward()
    assert mode.waits == []
    assert hidden.grad is not None
    assert weight.grad is not None
    assert {hidden.grad.dtype, weight.grad.dtype} == {torch.float32}
