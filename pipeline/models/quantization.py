"""A model that is quantised while it is loaded, by transformers' own settings."""

import difflib
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig, HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from pipeline.errors import ConfigError
from pipeline.models.weights import quiet
from pipeline.types import Json

BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4 bit."""


def quantization_config(settings: Json) -> QuantizationConfigMixin:
    """The settings as transformers' own object. `quant_method` chooses its class; `load_in_4bit`
    and `load_in_8bit` mean bitsandbytes.

    Raises ConfigError for a method or a setting that transformers does not know, for values it
    refuses, and where the method's package is not installed.
    """
    kind = config_class(settings)
    known = set(inspect.signature(kind).parameters) - {"kwargs"} | {"quant_method"}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            raise ConfigError(
                f"quantization.{name}: no such setting of transformers.{kind.__name__}"
                + (f"; did you mean {close[0]}?" if close else "")
            )
    try:
        return AutoQuantizationConfig.from_dict(dict(settings))
    except ImportError as error:
        raise not_installed(settings, error) from error
    except Exception as error:  # a value may make transformers raise whatever it does
        raise ConfigError(f"quantization: {error}") from error


def config_class(settings: Json) -> type:
    """Of transformers' quantization settings; ConfigError where they name no method."""
    method = method_of(settings)
    found = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if found is None:
        expected = "expected load_in_4bit: true, or a quant_method of transformers"
        close = difflib.get_close_matches(method, AUTO_QUANTIZATION_CONFIG_MAPPING, 1)
        raise ConfigError(
            f"quantization: {expected}, found {settings.get('quant_method')!r}"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    return found


def method_of(settings: Json) -> str:
    """The method, as transformers names it."""
    for bits in (4, 8):
        if settings.get(f"load_in_{bits}bit"):
            return f"bitsandbytes_{bits}bit"
    return str(settings.get("quant_method", ""))


def quantizer(settings: Json) -> HfQuantizer:
    """What quantises a model while it is loaded.

    Raises ConfigError as `quantization_config` does, and for a method that cannot quantise plain
    weights, or under which adapters cannot be trained.
    """
    config, method = quantization_config(settings), method_of(settings)
    if AUTO_QUANTIZER_MAPPING[method].requires_calibration:
        raise ConfigError(
            f"quantization: {method} reads a corpus to quantise with, which a load cannot do; use "
            "load_in_4bit: true"
        )
    try:
        found = AutoHfQuantizer.from_config(config, pre_quantized=False)
        found.validate_environment(device_map=None)
    except ImportError as error:
        raise not_installed(settings, error) from error
    except Exception as error:
        raise ConfigError(f"quantization: {error}") from error
    if not found.is_trainable:
        raise ConfigError(
            f"quantization: transformers trains no adapters on {method} weights; use "
            "load_in_4bit: true"
        )
    return found


def not_installed(settings: Json, error: ImportError) -> ConfigError:
    ours = "; `pip install 'mol-distill[qlora]'`" if "bitsandbytes" in method_of(settings) else ""
    return ConfigError(
        f"quantization: {method_of(settings)} is not installed, or cannot be used here "
        f"({short(error)}){ours}"
    )


def short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for kernels without a backward.

    It does so at the first evaluation on a CPU with AVX512-BF16, and never unpacks them: in
    training, gradients would then silently end at each such layer.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class QuantisedSize(NamedTuple):
    """The parameters that a load quantises."""

    weights: int = 0
    size: int = 0
    """Bytes, scales included."""
    workspace: int = 0
    """Bytes of the largest one in the dtype of the computation: one at a time is dequantised."""


def as_quantised(model: PreTrainedModel, settings: Json) -> QuantisedSize:
    """Replace the layers of a model on the meta device that a load would quantise by `StandIn`."""
    by = quantizer(settings)
    config = by.quantization_config
    computed = getattr(config, "bnb_4bit_compute_dtype", model.dtype)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    with quiet():
        by.preprocess_model(model=model, dtype=model.dtype, device_map=None)
    count, size, largest = 0, 0.0, 0
    for name, weight in list(model.named_parameters()):
        if not by.param_needs_quantization(model, name):
            continue
        here = counts[name]
        count, largest = count + here, max(largest, here)
        size += here * by.param_element_size(model, name, weight) + scale_bytes(config, here)
        layer = name.rpartition(".")[0]
        model.set_submodule(layer, StandIn(model.get_submodule(layer), computed))
    return QuantisedSize(count, int(size), largest * computed.itemsize)


class StandIn(nn.Linear):
    """A quantised layer without values: it keeps for the backward what the real one keeps."""

    def __init__(self, layer: Any, computed: torch.dtype) -> None:
        shape = layer.in_features, layer.out_features
        super().__init__(*shape, bias=layer.bias is not None, device="meta", dtype=torch.float32)
        self.computed = computed

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = Product.apply(input.to(self.computed), self.weight)
        return found.to(input.dtype)


class Product(torch.autograd.Function):
    """A product that keeps nothing: its backward dequantises the weights again."""

    @staticmethod
    def forward(_: Any, input: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(input, weight.to(input.dtype))


def scale_bytes(config: QuantizationConfigMixin, weights: int) -> float:
    """Bytes of the scales of so many weights in bitsandbytes' 4 bit; 0 for other methods.

    A block of 64 weights has a float32. With double quantisation it is one byte, and 256 of those
    have a float32 (QLoRA, arXiv 2305.14314, section 3).
    """
    if not getattr(config, "load_in_4bit", False):
        return 0.0
    blocks = weights / BLOCK
    return blocks + 4 * blocks / 256 if config.bnb_4bit_use_double_quant else 4 * blocks
