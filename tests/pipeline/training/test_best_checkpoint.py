"""KL to a held-out dump during training, and the best checkpoint by the user's metric."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import CorpusConfig, HeldOutConfig, LossConfig
from pipeline.data.packing import pack_row
from pipeline.errors import ConfigError, RefusedError
from pipeline.losses import sparse_divergence
from pipeline.training import train
from storage import LogitDataset
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model
from tests.helpers.runs import settings


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(12)])


def evaluations(run: str, metric: str) -> dict[int, float]:
    """The value of the metric at each step that logged it."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[metric] for line in lines if metric in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_to_a_held_out_dump(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path, direction: Any
) -> None:
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        loss=LossConfig(direction=direction),
        held_out=HeldOutConfig(dump=str(dump_path), dump_limit=10),
        training={"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
    )
    summary = train.run(config)
    found = evaluations(config.output, "eval_general_kl")
    assert list(found) == [0, 3, 6]
    assert 0 <= found[0] < 1e-3 < found[3]  # at first the student equals the base
    assert summary["eval_general_kl"] == found[6]

    row = pack_row([], list(LogitDataset(dump_path))[:10])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        out = student(row["input_ids"], position_ids=row["position_ids"], use_cache=False)
    targets = row["targets"]
    logits, stored = out.logits[0, targets["rows"]], (targets["logprobs"], targets["tail_logprob"])
    kl = sparse_divergence(logits, targets["ids"].long(), *stored, direction)
    assert found[6] == pytest.approx(kl.mean().item(), rel=1e-3)


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_the_student_is_the_best_checkpoint_also_after_a_resume(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path, lora: Any
) -> None:
    """With CE alone the student moves away from the base: the first checkpoint is the best."""
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        lora=lora,
        loss=LossConfig(alpha=0.0),
        held_out=HeldOutConfig(domain=CorpusConfig(str(domain)), dump=str(dump_path)),
        training={
            "max_steps": 12,
            "learning_rate": 1e-2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_general_kl",
        },
    )
    run = tmp_path / "run"
    summary = train.run(config)
    found = evaluations(config.output, "eval_general_kl")
    assert found[4] < found[8]
    best = {"checkpoint": "checkpoint-4", "step": 4, "eval_general_kl": found[4]}
    assert summary["best"] == best
    chosen = weights(run / "model")
    if lora is None:
        assert same(chosen, weights(run / "checkpoint-4"))

    # As if killed after the second checkpoint: the resumed run knows the best one before.
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    (run / "checkpoint-12" / "distill.json").unlink()
    config.training["max_steps"] = 12
    assert train.run(config)["best"] == best
    assert same(chosen, weights(run / "model"))

    # The same run without load_best_model_at_end ends with another student.
    config.output = str(tmp_path / "last")
    del config.training["load_best_model_at_end"], config.training["metric_for_best_model"]
    assert train.run(config)["best"] is None
    assert not same(chosen, weights(tmp_path / "last" / "model"))


@pytest.mark.parametrize("metric", ["eval_loss", None])
def test_a_metric_that_is_not_measured_is_refused(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path, metric: str | None
) -> None:
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        held_out=HeldOutConfig(dump=str(dump_path)),
        training={"load_best_model_at_end": True, "save_strategy": "epoch"},
    )
    if metric is not None:
        config.training["metric_for_best_model"] = metric
    with pytest.raises(ConfigError, match="choose from eval_general_kl"):
        train.run(config)


def test_a_held_out_dump_of_another_teacher_is_refused(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    from pipeline.config import DumpConfig
    from pipeline.dump import dump

    other = tiny_model(tmp_path / "other", seed=9)
    held_out = tmp_path / "held_out"
    dump.run(
        DumpConfig(str(other), CorpusConfig(str(domain)), str(held_out), engine="transformers", k=4)
    )
    config = settings(
        tmp_path, model_path, dump_path, domain, held_out=HeldOutConfig(dump=str(held_out))
    )
    with pytest.raises(RefusedError, match="different teachers"):
        train.run(config)
