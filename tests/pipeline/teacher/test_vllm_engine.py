"""The check of vLLM's interfaces."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.engine_args import check_engine_args
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.teacher import vllm_engine
from pipeline.teacher.vllm_log import VllmLog
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"no_such": 1}, "engine_args.no_such: .* unexpected keyword"),
        ({"gpu_memory_utilization": "x"}, "engine_args.gpu_memory_utilization: .*valid number"),
        ({"max_num_batched_tokens": {"class_path": "os.system"}}, "engine_args.max_num_batched_"),
        ({"compilation_config": {"no_such": 1}}, "engine_args.compilation_config: .*no_such"),
        ({"seed": [1]}, "engine_args.seed: "),
    ],
)
def test_an_argument_that_vllm_refuses_is_named(
    tmp_path: Path, given: dict[str, object], message: str
) -> None:
    model = ModelFolder(tiny_model(tmp_path))
    settings = vllm_engine.engine_settings(model, "float32", 64, given)
    log = VllmLog()
    try:
        with pytest.raises(ConfigError, match=message):
            vllm_engine.start_engine(settings, log)
    finally:
        log.remove()


@pytest.mark.parametrize(
    "given",
    [
        {"tensor_parallel_size": "2"},
        {"tensor_parallel_size": 0},
        {"pipeline_parallel_size": True},
        {"max_model_len": "x"},
        {"hf_overrides": 5},
    ],
)
def test_arguments_that_are_read_here_have_their_types(given: dict[str, object]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=f"engine_args.{name}: expected "):
        check_engine_args(given)


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
