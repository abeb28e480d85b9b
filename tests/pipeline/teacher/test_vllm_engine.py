"""The check of vLLM's interfaces."""

import pytest

from pipeline.errors import ConfigError
from pipeline.teacher import vllm_engine

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
