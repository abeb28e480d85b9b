"""The saved student is the trained one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.config import CorpusConfig, HeldOutConfig, TrainConfig
from pipeline.errors import RefusedError
from pipeline.evaluation.compare import compare, load
from pipeline.evaluation.measures import Sums
from pipeline.models.directory import ModelFolder
from pipeline.study import arms
from pipeline.training import train
from pipeline.training.inputs import Inputs
from pipeline.training.output import Output
from pipeline.training.saved import check_same
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model
from tests.helpers.runs import settings


@pytest.fixture
def config(tmp_path: Path, model_path: Path) -> TrainConfig:
    """A run that moves far from its base, whose embeddings are tied to its head."""
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(6)])
    training = {"max_steps": 4, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 4}
    held_out = HeldOutConfig(domain=CorpusConfig(str(domain)))
    options: dict[str, Any] = {"mix": 0, "max_length": 64, "held_out": held_out}
    return settings(tmp_path, model_path, None, domain, training=training, **options)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_tied_embeddings_that_lora_adapts(
    config: TrainConfig, tmp_path: Path, model_path: Path, lora: Any
) -> None:
    """The head is untied, because training left it as it was."""
    config.lora = lora
    trained = train.run(config)["eval_domain_perplexity"]
    student = ModelFolder(tmp_path / "run" / "model")
    total = sum(compare(load(student, "float32"), None, Inputs(config).domain), Sums())
    assert total.perplexity == pytest.approx(trained, rel=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model_path)
    saved = AutoModelForCausalLM.from_pretrained(student.path)
    assert torch.equal(saved.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(saved.model.embed_tokens.weight, base.model.embed_tokens.weight)

    # Half way between a tied base and this student, each of the two matrices is.
    arms.interpolate(ModelFolder(model_path), student, 0.5, Output(tmp_path / "half", {}))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "model")
    embeddings = torch.lerp(base.model.embed_tokens.weight, saved.model.embed_tokens.weight, 0.5)
    torch.testing.assert_close(half.model.embed_tokens.weight, embeddings)
    assert torch.equal(half.lm_head.weight, base.lm_head.weight)


def test_a_model_that_was_saved_wrongly_is_not_the_result(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: PreTrainedModel, folder: Path) -> None:
        saved(self, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] *= 0.5
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    train.run(config)
    (tmp_path / "run" / "summary.json").unlink()
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    saved = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    with pytest.raises(RefusedError, match=r"model\.draft: does not predict what the trained"):
        train.run(config)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_the_own_dtype_is_no_difference(
    config: TrainConfig, tmp_path: Path, dtype: torch.dtype
) -> None:
    config.model = str(tiny_model(tmp_path / "half", dtype=dtype))
    config.training["bf16"] = True
    config.lora = {"r": 4, "target_modules": "all-linear"}
    train.run(config)
    assert ModelFolder(tmp_path / "run" / "model").load("auto").dtype == dtype


def test_predictions_that_are_not_numbers_are_refused() -> None:
    logprobs = torch.zeros(3, 4).log_softmax(-1)
    check_same(logprobs, logprobs, True, "a model")
    with pytest.raises(RefusedError, match="mean KL nan"):
        check_same(logprobs, logprobs * torch.nan, False, "a model")
