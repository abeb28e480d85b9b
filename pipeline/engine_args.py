"""The arguments that go to vLLM unchanged, but for those that this project never passes on."""

from collections.abc import Iterator
from typing import Any

from pipeline.errors import ConfigError

NAMES_CODE = (
    "trust_remote_code", "worker_cls", "worker_extension_cls", "scheduler_cls", "logits_processors",
    "io_processor_plugin", "reasoning_parser_plugin", "model_class_overrides", "inductor_passes",
    "kv_connector_module_path", "ec_connector_module_path",
)  # fmt: skip
SET_ELSEWHERE = {
    "model": "set model, whose fingerprint is in the plan",
    "model_weights": "set model, whose fingerprint is in the plan",
    "hf_config_path": "set model, whose config.json is read",
    "dtype": "set dtype, which is in the plan",
    "hf_token": "a token does not belong into settings; set HF_TOKEN in the environment",
}

READ_HERE = {
    "tensor_parallel_size": int, "pipeline_parallel_size": int, "max_model_len": int,
    "hf_overrides": dict,
}  # fmt: skip
"""Arguments that this project itself computes with; vLLM checks the others."""

HUGGING_FACE_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "pt", "npcache")

ANSWERS_THE_SAME = frozenset((
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
    "enable_expert_parallel", "distributed_executor_backend", "max_parallel_loading_workers",
    "disable_custom_all_reduce", "gpu_memory_utilization", "kv_cache_memory_bytes",
    "num_gpu_blocks_override", "swap_space", "cpu_offload_gb", "block_size",
    "enable_prefix_caching", "enable_chunked_prefill", "max_num_seqs", "max_num_batched_tokens",
    "scheduling_policy", "async_scheduling", "enforce_eager", "compilation_config",
    "attention_backend", "load_format", "download_dir", "safetensors_load_strategy",
    "use_tqdm_on_load", "disable_log_stats", "limit_mm_per_prompt",
))  # fmt: skip
"""Arguments that change where and how fast the engine works, and no answer beyond rounding."""


def changing_answers(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that may change what the model answers: all that are not known not to."""
    named = {str(name).replace("-", "_"): value for name, value in given.items()}
    return {name: named[name] for name in sorted(named.keys() - ANSWERS_THE_SAME)}


def check_engine_args(given: dict[str, Any]) -> None:
    """ConfigError for arguments of vLLM that run code, or that make plan and weights differ."""
    for name, value in nested(given):
        # Some take the name of a class where others have a word.
        a_class = name in ("distributed_executor_backend", "backend") and "." in str(value)
        if a_class or (name in NAMES_CODE and value not in (None, False, [], {})):
            raise ConfigError(
                f"engine_args.{name}: names code to run. Only the code of this project and of its "
                "packages is run; use a model that vLLM knows, and leave this out"
            )
    for name in sorted(SET_ELSEWHERE.keys() & {str(key).replace("-", "_") for key in given}):
        raise ConfigError(f"engine_args.{name}: {SET_ELSEWHERE[name]}")
    for name, kind in READ_HERE.items():
        if name in given and (type(given[name]) is not kind or (kind is int and given[name] < 1)):
            wanted = "a whole number, at least 1" if kind is int else "an object"
            raise ConfigError(f"engine_args.{name}: expected {wanted}, found {given[name]!r:.80}")
    if given.get("load_format") == "dummy":
        raise ConfigError("engine_args.load_format: dummy makes the weights up. Leave it out")


def reads_hugging_face(given: dict[str, Any]) -> bool:
    """Whether vLLM reads files with transformers' names of the tensors. Its other formats have
    names of their own."""
    return given.get("load_format", "auto") in HUGGING_FACE_FORMATS


def nested(settings: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting, those within others too."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield str(name).replace("-", "_"), value
            yield from nested(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from nested(value)
