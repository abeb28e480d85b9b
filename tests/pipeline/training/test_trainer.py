"""An optimizer step on sequences with masks, compared with its definition in float64."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.packing import collate, pack_row, with_targets
from pipeline.losses import MIN_TAIL_LOGPROB, Direction
from pipeline.positions import Share
from pipeline.training.forward import add_distill_forward
from storage import Record
from tests.helpers.losses import both
from tests.helpers.masked_step import (
    ALPHA,
    CASES,
    LAYOUTS,
    Item,
    items,
    model,
    step,
    trainer_of,
)
from tests.helpers.masks import masked
from tests.helpers.paths import ROOT

Steps = dict[tuple[str, Direction], dict[str, Any]]


def naive(given: list[Item], direction: Direction) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, its gradients): each sequence alone, one position at a time."""
    student = model()
    ce, kl = [], []
    for item in given:
        log_q, targets = predicted(student, item.domain.input_ids), item.domain.targets
        assert targets is not None
        for t, token in enumerate(item.domain.input_ids[1:]):
            if targets[t + 1]:
                ce.append(-log_q[t, token])
        log_q, topk = predicted(student, item.whole.input_ids), item.whole.topk
        ends = np.cumsum(topk.counts)
        for t, (end, count) in enumerate(zip(ends, topk.counts, strict=True)):
            if item.targets[t + 1]:
                stored = slice(end - count, end)
                kept, log_p = topk.ids[stored], torch.from_numpy(topk.logprobs[stored]).double()
                tail = torch.tensor(topk.tail_logprob[t]).double()
                kl.append(
                    divergence(log_q[t], torch.from_numpy(kept).long(), log_p, tail, direction)
                )
    loss = torch.stack(ce).mean() + ALPHA * torch.stack(kl).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in student.named_parameters()}


def predicted(student: Any, ids: np.ndarray) -> Tensor:
    """[tokens, V] log-probabilities."""
    logits: Tensor = student(torch.from_numpy(ids[None].astype(np.int64))).logits[0]
    return logits.log_softmax(-1)


def divergence(
    log_q: Tensor, kept: Tensor, log_p: Tensor, tail: Tensor, direction: Direction
) -> Tensor:
    """KL of one position, from its definition on {kept ids, tail}."""
    others = torch.ones(len(log_q), dtype=torch.bool).scatter(0, kept, False)
    log_b = log_q[others].logsumexp(0)
    if direction == "forward":
        return (log_p.exp() * (log_p - log_q[kept])).sum() + tail.exp() * (tail - log_b)
    log_a = tail.clamp(min=MIN_TAIL_LOGPROB)
    return (log_q[kept].exp() * (log_q[kept] - log_p)).sum() + log_b.exp() * (log_b - log_a)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> None:
    assert found.keys() == expected.keys()
    size = torch.cat([each.flatten() for each in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= within * size, name


@both
@pytest.mark.parametrize("layout", ["one row", "micro-batches", "short rows"])
def test_a_step_is_that_of_a_naive_reference(
    tmp_path: Path, layout: str, direction: Direction
) -> None:
    given, how = items("some"), LAYOUTS[layout]
    loss, expected = naive(given, direction)
    found = step(tmp_path, given, direction, how)
    assert_same(found["gradients"], expected, 1e-12)
    logged = found["logged"]
    assert logged["domain_tokens"] == sum(item.domain.targets[1:].sum() for item in given)
    assert logged["general_tokens"] == sum(item.targets[1:].sum() for item in given)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)  # logged in float32

    trainer = trainer_of(tmp_path, given, direction, how)
    counts = torch.tensor([logged["domain_tokens"], logged["general_tokens"]])
    data = trainer.train_dataset
    rows = collate([data[at] for at in range(len(given))], how.row_tokens)["packed"]
    parts = [trainer.row_losses(trainer.model, row, counts)["loss"] for row in rows]
    torch.testing.assert_close(torch.stack(parts).sum(), loss, rtol=1e-12, atol=0)


@both
def test_what_is_no_target_leaves_the_gradient_bit_for_bit(
    tmp_path: Path, direction: Direction
) -> None:
    """Neither the token that would be its label, nor the distribution that a dump stores of it.

    A token that is masked is still read by later positions. So the last one is changed, which none
    reads.
    """
    given = items("some")
    for item in given:
        for targets in (item.domain.targets, item.targets):
            targets[-1] = False
    how = LAYOUTS["short rows"]
    before = step(tmp_path, given, direction, how)["gradients"]
    other_labels = [
        item._replace(
            domain=replace(item.domain, input_ids=other_end(item.domain.input_ids)),
            whole=replace(item.whole, input_ids=other_end(item.whole.input_ids)),
        )
        for item in given
    ]
    other_distributions = [item._replace(whole=other_at(item, ~item.targets)) for item in given]
    for changed in (other_labels, other_distributions):
        found = step(tmp_path, changed, direction, how)["gradients"]
        assert all(torch.equal(found[name], gradient) for name, gradient in before.items())
    # The same changes at targets are learnt.
    learnt = [item._replace(whole=other_at(item, item.targets)) for item in given]
    found = step(tmp_path, learnt, direction, how)["gradients"]
    assert not any(torch.equal(found[name], gradient) for name, gradient in before.items())


def other_end(ids: np.ndarray) -> np.ndarray:
    return np.append(ids[:-1], (ids[-1:] + 1) % 50).astype(np.int32)


def other_at(item: Item, tokens: np.ndarray) -> Any:
    """The general sequence's record with other kept ids where these tokens are predicted."""
    topk = item.whole.topk
    changed = np.repeat(tokens[1:], topk.counts)
    ids = np.where(changed, (topk.ids + 7) % 50, topk.ids).astype(np.int32)
    return replace(item.whole, topk=replace(topk, ids=ids))


@pytest.mark.parametrize("case", ["none", "none on rank 1"])
def test_a_batch_or_a_step_without_targets_adds_nothing(tmp_path: Path, case: str) -> None:
    given = items(case)
    found = step(tmp_path, given, "reverse", LAYOUTS["micro-batches"])
    logged = found["logged"]
    assert logged["domain_tokens"] == sum(item.domain.targets[1:].sum() for item in given)
    assert logged["general_tokens"] == sum(item.targets[1:].sum() for item in given)
    if case == "none":
        assert logged["loss"] == logged["ce"] == logged["kl"] == logged["grad_norm"] == 0
        assert not any(gradient.any() for gradient in found["gradients"].values())
        return
    _, expected = naive(given, "reverse")
    assert_same(found["gradients"], expected, 1e-12)


def test_a_random_share_of_the_positions_is_unbiased() -> None:
    """The mean gradient of 50 draws is as near to that of all positions as their variance allows.

    Draws from the first half of each sequence alone are not.
    """
    student = model()
    add_distill_forward(student, "forward")
    records = [item.whole for item in items("some")]
    every = kl_gradient(student, records)
    draws = [
        [Share(0.2, seed).draw(one.doc_id, 0, None, len(one.input_ids)) for one in records]
        for seed in range(50)
    ]
    halves = [
        [mask & (np.arange(len(mask)) <= len(mask) // 2) for mask in masks] for masks in draws
    ]
    found = []
    for chosen in (draws, halves):
        gradients = torch.stack([kl_gradient(student, map(masked, records, one)) for one in chosen])
        off = (gradients.mean(0) - every).square().sum()
        found.append((off / (gradients.var(0).sum() / len(draws))).item())
    unbiased, biased = found
    assert 0.3 < unbiased < 2  # 1 is expected
    assert biased > 4


def kl_gradient(student: Any, records: Iterable[Record]) -> Tensor:
    """[parameters] of the mean KL over the targets of all records."""
    row = pack_row([], list(records))
    number = len(row["targets"]["rows"])
    weights = torch.full((number,), 1 / number).double()
    student.zero_grad()
    student(**with_targets(row, row_weights=weights))["loss"].backward()
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_ranks_learn_what_one_learns(tmp_path: Path, layout: str) -> None:
    """Also where one rank, or both, have no target; and where one has a row more than the other."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "tests.helpers.masked_step", str(tmp_path), layout]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps: Steps = torch.load(tmp_path / f"{layout}.pt")
    assert {case for case, _ in steps} == set(CASES)
    for (case, direction), found in steps.items():
        alone = step(tmp_path, items(case), direction, LAYOUTS["one row"])
        assert_same(found["gradients"], alone["gradients"], 1e-12)
        for name in ("ce", "kl", "loss", "domain_tokens", "general_tokens"):
            assert found["logged"][name] == pytest.approx(alone["logged"][name], rel=1e-6), name
