"""The targets of the control arms, compared with their definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.data.packing import PackedRow
from pipeline.study import targets
from tests.helpers.models import tiny_model
from tests.helpers.rows import losses, mixed_row, mixed_sequences


@pytest.fixture(params=[False, True], ids=["all tokens", "masks"])
def with_masks(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def row(dump_path: Path, with_masks: bool) -> PackedRow:
    return mixed_row(dump_path, with_masks)


def alone(model: Path, ids: np.ndarray) -> torch.Tensor:
    """[P, V] log-probabilities of one sequence by itself, in float64."""
    loaded = AutoModelForCausalLM.from_pretrained(model).double()
    with torch.no_grad():
        logits = loaded(torch.from_numpy(ids[None].astype(np.int64))).logits
    return logits[0, :-1].log_softmax(-1)


def test_labels_are_cross_entropy_on_all(
    tmp_path: Path, dump_path: Path, row: PackedRow, with_masks: bool
) -> None:
    student = tiny_model(tmp_path / "student", seed=3)
    scored, found = losses(student, targets.labels(row))
    assert scored == len(found) == len(row["targets"]["rows"])
    domain, general = mixed_sequences(dump_path, with_masks)
    expected = []
    for one in [*domain, *general]:
        labels = torch.from_numpy(one.input_ids[1:, None].astype(np.int64))
        losses_of_all = -alone(student, one.input_ids).gather(1, labels)[:, 0]
        expected.append(losses_of_all[one.positions])
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_cut_moves_the_rest_to_the_tail(row: PackedRow) -> None:
    stored = row["targets"]
    found = targets.cut(row, 3)["targets"]
    assert found["ids"].tolist() == stored["ids"][:, :3].tolist()
    rest = stored["tail_logprob"].double().exp() + stored["logprobs"][:, 3:].double().exp().sum(1)
    torch.testing.assert_close(found["tail_logprob"].double(), rest.log(), rtol=1e-5, atol=1e-6)
    assert targets.cut(row, 8) is row


def test_renormalised_has_no_tail_and_drifts(model_path: Path, row: PackedRow) -> None:
    """Where the student equals the teacher, the loss is -log of the kept mass, not 0."""
    found = targets.renormalised(row)["targets"]
    assert (found["tail_logprob"] == -torch.inf).all()
    torch.testing.assert_close(found["logprobs"].exp().sum(1), torch.ones(len(found["ids"])))
    domain, at_base = losses(model_path, targets.renormalised(row))
    _, with_tail = losses(model_path, row)
    held = row["targets"]["logprobs"].exp().sum(1)
    torch.testing.assert_close(at_base[domain:], -held.log(), rtol=0, atol=1 / 16)  # the codec
    assert at_base[domain:].mean() > 100 * with_tail[domain:].mean()
