"""Quantised weights: which settings are refused, their gradients, their size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.quantizers import quantizer_bnb_4bit

from pipeline.errors import ConfigError
from pipeline.models.attention import alone, tolerance
from pipeline.models.directory import ModelFolder
from pipeline.models.head import linear_head
from pipeline.models.quantization import as_quantised, quantizer
from pipeline.training.student import with_lora
from tests.helpers.runs import NF4, settings

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected load_in_4bit: true, or a quant_method of transformers, found None"),
        ({"load_in_4bits": True}, "expected load_in_4bit: true"),
        ({"quant_method": "torcha0"}, "found 'torcha0'; did you mean torchao"),
        (
            {**NF4, "bnb_4bit_quant_typ": "nf4"},
            r"quant_typ: no .*mean bnb_4bit_quant_type",
        ),
        ({**NF4, "bnb_4bit_compute_dtype": "float17"}, "quantization: .*float17"),
        ({**NF4, "load_in_8bit": True}, "only one can be used"),
        ({"quant_method": "awq"}, "awq reads a corpus"),
        ({"quant_method": "hqq"}, "hqq is not installed"),
    ],
)
def test_bad_settings_say_what_to_do(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantizer(given)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match=r"4bit is not .*install 'mol-distill\[qlora\]'"):
        quantizer(NF4)


def gradients(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(1, 25)[None]
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def dequantise(model: nn.Module) -> None:
    """Replace each quantised layer by a plain one of the same values."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, plain)


def test_gradients_pass_quantised_weights_also_after_an_evaluation(
    tmp_path: Path, model_path: Path
) -> None:
    """On some CPUs bitsandbytes packs the weights at an evaluation, and gradients end there."""
    config = settings(tmp_path, model_path, None, tmp_path, mix=0, max_length=8)
    config.lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    found = {}
    for kind in ("quantised", "dequantised"):
        model = ModelFolder(model_path).load("float32", NF4)
        assert model.is_quantized
        if kind == "dequantised":
            dequantise(model)
        torch.manual_seed(0)
        model = with_lora(model, config)
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(1, 25)[None])
        found[kind] = gradients(model)
    assert found["quantised"].keys() == found["dequantised"].keys()
    for name, gradient in found["quantised"].items():
        expected = found["dequantised"][name]
        assert expected.abs().max() > 0
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max()), name


@pytest.mark.parametrize("double", [False, True])
def test_size_is_that_of_the_loaded_weights(model_path: Path, double: bool) -> None:
    given = {**NF4, "bnb_4bit_use_double_quant": double}
    folder = ModelFolder(model_path)
    weights = {
        name: weight
        for name, weight in folder.load("float32", given).named_parameters()
        if hasattr(weight, "quant_state")
    }
    held = 0
    for weight in weights.values():
        state = weight.quant_state
        held += weight.nbytes + state.absmax.nbytes
        held += state.state2.absmax.nbytes if double else 0
    found = as_quantised(folder.empty(torch.float32), given)
    assert len(weights) == 14  # seven in each layer
    assert found.weights == 2 * sum(weight.numel() for weight in weights.values())
    assert found.size == pytest.approx(held, rel=0.02)  # of one layer, blocks of 256 are not full
    assert found.workspace == 4 * 64 * 128


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    from tests.helpers.models import tiny_model

    folder = ModelFolder(tiny_model(tmp_path / "model", tie=False))
    model = folder.load("float32", {**NF4, "llm_int8_skip_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match=r"Add lm_head to quantization\.llm_int8_skip_modules"):
        linear_head(model)


def test_attention_is_compared_in_the_dtype_of_the_computation(model_path: Path) -> None:
    probes = [torch.arange(8)]

    def allowed(given: dict[str, object]) -> float:
        model = ModelFolder(model_path).load("float32", given)
        return tolerance(model, probes, alone(model, probes))

    assert allowed({**NF4, "bnb_4bit_compute_dtype": "bfloat16"}) > 10 * allowed(NF4)
