"""The check of vLLM's interfaces."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.teacher import vllm_engine
from tests.helpers.models import tiny_model

pytest.importorskip("vllm")


def test_a_vllm_with_other_interfaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_engine.check_interface()
    other = [
        ("vllm", "LLMEngine.add_request", "request_id colour"),
        ("vllm", "LLMEngine.fly", ""),
        ("vllm.nowhere", "Thing", ""),
    ]
    monkeypatch.setattr(vllm_engine, "VLLM_INTERFACE", other)
    with pytest.raises(ConfigError) as refused:
        vllm_engine.check_interface()
    for words in ("add_request: no parameter colour", "LLMEngine.fly", "vllm.nowhere", "0.32"):
        assert words in str(refused.value)


def test_weights_are_checked_before_the_engine_starts(tmp_path: Path) -> None:
    """vLLM itself may take a model that lacks tensors."""
    model = tiny_model(tmp_path)
    settings = vllm_engine.engine_settings(ModelFolder(model), "float32", 64, {})
    assert settings["trust_remote_code"] is False
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.input_layernorm"):
        vllm_engine.engine_settings(ModelFolder(model), "float32", 64, {})
    with pytest.raises(ConfigError, match="names code"):
        vllm_engine.engine_settings(ModelFolder(model), "auto", 64, {"trust_remote_code": True})
