"""Runs on 4-bit weights: null test, resuming, what is saved, what is refused."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import CorpusConfig, EvalConfig, NullTestConfig, TrainConfig
from pipeline.errors import ConfigError, RefusedError
from pipeline.evaluation import evaluate
from pipeline.json_files import read_object
from pipeline.models.directory import ModelFolder
from pipeline.training import quantised, train
from pipeline.training.arguments import training_arguments
from storage import Record
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import with_rows
from tests.helpers.models import quantise_int8, tiny_model
from tests.helpers.runs import NF4, settings, steps

pytest.importorskip("bitsandbytes")
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domain")
    return write_texts(folder / "domain.jsonl", [text[::-1] for text in some_texts(4)])


@pytest.fixture
def config(tmp_path: Path, model_path: Path, dump_path: Path, domain: Path) -> TrainConfig:
    return settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        lora=LORA,
        quantization=NF4,
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    )


def test_a_run_learns_resumes_exactly_and_saves_what_it_learnt(
    config: TrainConfig, model_path: Path, domain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft

    summary, output = train.run(config), Path(config.output)
    said = capsys.readouterr().err
    # The dump is right, so what is left of the KL is the quantisation.
    assert re.search(r"null test: KL .* bound .*: the dump is this model's", said)
    assert f"quantisation costs {summary['null_test']['quantisation_kl']:.3g}" in said
    assert 0.01 < summary["null_test"]["quantisation_kl"] < summary["null_test_kl"] < 0.2
    assert f"differs by {summary['merged_kl']:.3g} nats" in said
    assert 0 < summary["merged_kl"] < 1
    assert summary["identity"]["quantization"] == NF4
    # The adapters, on the weights as the base's files hold them, are the model.
    base = ModelFolder(model_path).load("float32")
    merged = peft.PeftModel.from_pretrained(base, output / "adapter").merge_and_unload()
    saved = load_file(output / "model" / "model.safetensors")
    for name, weight in merged.state_dict().items():
        if name in saved:
            assert torch.allclose(weight, saved[name], atol=1e-6), name
    assert "quantization_config" not in (read_object(output / "model" / "config.json") or {})
    models = {"base": str(model_path), "student": str(output / "model")}
    report = evaluate.run(EvalConfig(models, domain=CorpusConfig(str(domain)), max_length=100))
    assert report["models"]["student"]["domain_perplexity"] > 0
    # A checkpoint holds the adapters alone, and the steps after it are the same again.
    logged = steps(output)
    size = (output / "checkpoint-2" / "adapter_model.safetensors").stat().st_size
    assert size < 100_000 < (model_path / "model.safetensors").stat().st_size
    for made in ("checkpoint-4", "model", "adapter"):
        shutil.rmtree(output / made)
    (output / "summary.json").unlink()
    train.run(config)
    assert "resuming from checkpoint-2" in capsys.readouterr().err
    assert steps(output) == logged
    again = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in saved.items())
    other = replace(config, quantization={**NF4, "bnb_4bit_quant_type": "fp4"})
    with pytest.raises(RefusedError, match="bnb_4bit_quant_type: 'nf4' in the run, 'fp4' asked"):
        train.run(other)


def another_models(record: Record) -> Record:
    """A row whose distributions are not this model's, though its plan says so."""
    turned = replace(record.topk, ids=((record.topk.ids + 7) % 512).astype(np.int32))
    return replace(record, topk=turned)


@pytest.mark.parametrize("fits", [True, False])
def test_the_null_test_refuses_a_wrong_dump(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    if not fits:
        monkeypatch.setattr(quantised, "place_of", lambda *_: None)
    config.dump = str(with_rows(Path(str(config.dump)), tmp_path / "wrong", another_models))
    message = "has the teacher's weights, but" if fits else "not fit into memory .*another model's"
    with pytest.raises(RefusedError, match=message):
        train.run(config)


def test_without_room_for_the_unquantised_weights_the_bound_is_wide(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("free_bytes", "free_on_machine"):
        monkeypatch.setattr(quantised, name, lambda *_: 100_000)
    config.training = {**config.training, "max_steps": 1}
    summary = train.run(config)
    assert 0.01 < summary["null_test_kl"] < 0.2
    assert summary["null_test"]["quantisation_kl"] is None
    assert "so the bound is wide: 0.5 nats" in capsys.readouterr().err


def test_a_computation_that_overflows_is_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "measure", lambda *_: SimpleNamespace(mean=float("nan")))
    with pytest.raises(ConfigError, match="Set another bnb_4bit_compute_dtype"):
        train.run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {**NF4, "load_in_4bi": True}}, "load_in_4bi: no such .* load_in_4bit"),
        ({"lora": {**LORA, "init_lora_weights": "olora"}}, "olora changes the base's own weights"),
        ({"lora": {**LORA, "init_lora_weights": "pissa"}}, "lora.*PiSSA"),
        ({"quantization": {**NF4, "llm_int8_skip_modules": ["x"]}}, "Add lm_head to"),
    ],
)
def test_bad_settings_say_what_to_do(
    config: TrainConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "lm_head" in message:
        config = replace(config, model=str(tiny_model(tmp_path / "untied", tie=False)))
        config.null_test = NullTestConfig(batches=0)
    with pytest.raises(ConfigError, match=message):
        train.run(replace(config, **changes))


def test_without_adapters_there_is_nothing_to_train(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="quantization: quantised weights are not trained"):
        replace(config, lora=None)


def test_fsdp_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    args, folder = training_arguments(config), ModelFolder(Path(config.model))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"training\.fsdp: quantised weights are not shared out"):
        quantised.check(config, args, folder)


def test_a_model_that_is_quantised_already_is_refused(
    config: TrainConfig, tmp_path: Path, model_path: Path
) -> None:
    config.model = str(quantise_int8(shutil.copytree(model_path, tmp_path / "int8")))
    with pytest.raises(ConfigError, match="is quantised already"):
        train.run(config)
