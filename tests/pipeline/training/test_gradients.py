"""The gradients of the two parts of the objective, against autograd on full logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import LossConfig
from pipeline.corpus import Corpus
from pipeline.data.mixing import GeneralStream, MixedDataset
from pipeline.data.packing import collate
from pipeline.losses import sparse_divergence
from pipeline.models.directory import ModelFolder
from pipeline.training import inputs, train
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.masks import give_masks
from tests.helpers.models import tiny_model
from tests.helpers.runs import settings, steps

PARTS = ("ce_grad_norm", "kl_grad_norm", "grad_cosine")


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(12)])


@pytest.mark.parametrize("masks", [False, True])
def test_norms_and_cosine_are_those_of_autograd(
    tmp_path: Path, dump_path: Path, domain: Path, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masks:
        give_masks(monkeypatch)
    student = tiny_model(tmp_path / "student", seed=5)
    config = settings(
        tmp_path,
        student,
        dump_path,
        domain,
        loss=LossConfig(alpha=0.7),
        gradient_cosine_steps=1,
        row_tokens=200,
        training={"max_steps": 1, "per_device_train_batch_size": 2},
    )
    config.training |= {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    train.run(config)
    (logged,) = steps(config.output)

    model = AutoModelForCausalLM.from_pretrained(student)
    tokens = inputs.read_tokens(Corpus(config.domain, ModelFolder(student).tokenizer, 100))
    general = GeneralStream([inputs.LogitDataset(dump_path)], [1], 42)
    data = MixedDataset(tokens, general, 1.0, 42, 4)  # transformers' seed
    (row,) = collate([data[item] for item in range(4)])["packed"]
    targets = row["targets"]
    logits = model(row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits
    logits, labels = logits[0, targets["rows"]], len(targets["labels"])
    ce = torch.nn.functional.cross_entropy(logits[:labels], targets["labels"])
    kl = (
        0.7
        * sparse_divergence(
            logits[labels:], targets["ids"].long(), targets["logprobs"], targets["tail_logprob"]
        ).mean()
    )
    assert logged["ce"] == pytest.approx(ce.item(), rel=1e-4)  # the same step
    parameters = list(model.parameters())
    one, other = (
        torch.cat([g.flatten() for g in torch.autograd.grad(part, parameters, retain_graph=True)])
        for part in (ce, kl)
    )
    expected = [one.norm().item(), other.norm().item()]
    expected.append((one @ other).item() / (expected[0] * expected[1]))
    assert [logged[name] for name in PARTS] == pytest.approx(expected, rel=1e-3)
    assert logged["grad_norm"] == pytest.approx((one + other).norm().item(), rel=1e-3)
    tail = targets["tail_logprob"].exp().mean().item()
    assert logged["teacher_tail"] == pytest.approx(tail, rel=1e-4)


def test_measuring_gradients_does_not_change_training(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    runs = []
    for every in (0, 4):
        config = settings(
            tmp_path,
            model_path,
            dump_path,
            domain,
            output=str(tmp_path / str(every)),
            lora={"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5},
            gradient_cosine_steps=every,
            training={"max_steps": 9},
        )
        train.run(config)
        runs.append(steps(config.output))
    measured = [line["step"] for line in runs[1] if "grad_cosine" in line]
    assert measured == [4, 8]
    without = [
        {name: value for name, value in line.items() if name not in PARTS} for line in runs[1]
    ]
    assert without == runs[0]


def test_one_part_alone_has_no_cosine(tmp_path: Path, model_path: Path, domain: Path) -> None:
    config = settings(
        tmp_path,
        model_path,
        None,
        domain,
        mix=0,
        max_length=100,
        gradient_cosine_steps=1,
        training={"max_steps": 1},
    )
    train.run(config)
    (logged,) = steps(config.output)
    assert logged["kl_grad_norm"] == 0
    assert logged["ce_grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert "grad_cosine" not in logged
