"""The teacher that runs in vLLM."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline.corpus import Sequence
from pipeline.errors import ConfigError, Interrupted
from pipeline.models.directory import ModelFolder
from pipeline.progress import say
from pipeline.teacher.plugin import class_overrides
from pipeline.teacher.sampling import NO_SAMPLES, Sampling
from pipeline.teacher.teacher import Answers
from pipeline.teacher.vllm_engine import check_interface, engine_settings, start_engine
from pipeline.teacher.vllm_log import VllmLog
from storage import TopK


class VllmTeacher:
    """Runs vLLM with the top-k plug-in (topk_model.py), or with prompt_logprobs if the plug-in
    cannot wrap the model.

    `engine_args` go to vLLM's EngineArgs unchanged and override the defaults of `engine_settings`.
    Raises ConfigError if vLLM's interfaces differ from 0.32, if it did not load the plug-in, if
    samples are asked for that prompt_logprobs cannot draw, and if vLLM cannot run the model.
    """

    def __init__(
        self,
        model: ModelFolder,
        k: int,
        max_length: int,
        dtype: str = "auto",
        in_flight: int = 256,
        engine_args: dict[str, Any] | None = None,
        how: Sampling = NO_SAMPLES,
    ) -> None:
        check_interface()
        self.in_flight, self.requests = in_flight, 0
        self.model, self.log = model, VllmLog()
        settings = engine_settings(model, dtype, max_length, engine_args or {})
        architectures = settings.get("hf_overrides", {}).get("architectures", model.architectures)
        classes = class_overrides(architectures)
        if not classes and (how.draws or not k):
            raise ConfigError(
                f"samples {how.draws}, k {k}: the top-k plug-in cannot wrap "
                f"{', '.join(architectures)}, and vLLM's prompt_logprobs draw no samples. Set "
                "samples to 0 and k to 1 or more, or set engine: transformers"
            )
        self.path, self.engine = self.start(settings, classes, k, how)

    def start(
        self, settings: dict[str, Any], classes: dict[str, str], k: int, how: Sampling
    ) -> tuple["Pooled | PromptLogprobs", Any]:
        """The way to the answers, and the engine. Says why it is the slower one.

        Raises ConfigError or FailedError, with the reason, if vLLM does not start.
        """
        why, before = "the top-k plug-in has no class for this architecture", ""
        if classes:
            pooled = Pooled(k, how)
            wrapped = {**settings, "model_class_overrides": classes}
            if how.draws or not k:  # there is no other way to draw samples
                with self.log.explained(self.model):
                    return pooled, pooled.start(wrapped, self.log)
            try:
                return pooled, pooled.start(wrapped, self.log)
            except Interrupted:
                raise
            except Exception as error:
                before = self.log.reason(error)
            why = f"vLLM does not start with the top-k plug-in ({before}; {self.log.place})"
        say(f"{why}: using vLLM's prompt_logprobs, which is slower and gives the same shards")
        slower = PromptLogprobs(k)
        with self.log.explained(self.model, before):
            return slower, slower.start(settings, self.log)

    def __enter__(self) -> "VllmTeacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.engine_core.shutdown(timeout=30)
        self.log.remove()

    def topk(self, sequences: Iterable[Sequence]) -> Answers:
        waiting: dict[int, Sequence] = {}  # given to the engine, not yet yielded
        answers: dict[int, TopK] = {}  # done, but an earlier sequence is not
        names: dict[str, int] = {}  # running requests
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
                    self.engine.add_request(str(number), prompt, self.path.request(sequence))
                if not waiting:
                    return
                for output in self.step():
                    if output.finished and output.request_id in names:
                        number = names.pop(output.request_id)
                        answers[number] = self.path.answer(waiting[number], output)
                while following in answers:
                    yield waiting.pop(following), answers.pop(following)
                    following += 1
        finally:
            if names:
                self.engine.abort_request(list(names))

    def step(self) -> Any:
        """One step of the engine. ConfigError or FailedError, with the reason, if it fails: vLLM
        finds some of its limits only when it computes."""
        with self.log.explained(self.model):
            return self.engine.step()


class Pooled:
    """The path through the plug-in: answers arrive as tensors. The head computes the positions that
    a sequence asks for, and no others."""

    def __init__(self, k: int, how: Sampling = NO_SAMPLES) -> None:
        self.k, self.how = k, how

    def start(self, settings: dict[str, Any], log: VllmLog) -> Any:
        asked = {
            "topk_k": self.k,
            "topk_samples": self.how.draws,
            "topk_seed": self.how.seed,
            **settings.get("hf_overrides", {}),
        }
        return start_engine({**settings, "runner": "pooling", "hf_overrides": asked}, log)

    def request(self, sequence: Sequence) -> Any:
        """vLLM's parameters of one sequence."""
        from vllm import PoolingParams

        from pipeline.teacher.topk_model import asking_for

        asked = asking_for(sequence.positions, len(sequence.input_ids))
        return PoolingParams(task="token_classify", extra_kwargs=asked)

    def answer(self, sequence: Sequence, output: Any) -> TopK:
        """int32 [P, 1 + 2k + N] from the plug-in -> TopK of P positions.

        Raises RuntimeError for another shape.
        """
        packed = output.outputs.data
        shape = len(sequence.positions), 1 + 2 * self.k + self.how.draws
        if tuple(packed.shape) != shape:
            raise RuntimeError(
                f"document {sequence.doc_id!r}: vLLM returned {tuple(packed.shape)} for "
                f"{shape[0]} positions, expected {shape}. Check that vLLM is 0.32 and that no "
                "other plug-in replaces the model"
            )
        rows = packed.contiguous().numpy()
        values = rows[:, : 1 + self.k].copy().view(np.float32)
        drawn = rows[:, 1 + 2 * self.k :] if self.how.draws else None
        ids = rows[:, 1 + self.k : 1 + 2 * self.k]
        return TopK.from_dense(ids, values[:, 1:], values[:, 0], drawn)


class PromptLogprobs:
    """The path through vLLM's prompt_logprobs, as flat lists of Python numbers.

    They cost 12 us per token; vLLM's default dictionaries cost 102 us (vLLM #28226). The tail is
    one minus the kept mass, exact to 1e-7 only: a larger tail is as good as the plug-in's. vLLM
    computes every position; those that a sequence does not ask for are dropped here.
    """

    SMALLEST_TAIL = 1e-7

    def __init__(self, k: int) -> None:
        self.k = k

    def start(self, settings: dict[str, Any], log: VllmLog) -> Any:
        # vLLM generates one token after each sequence; the model never reads it.
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
        more = {"runner": "generate", "max_logprobs": self.k, "max_model_len": longer}
        return start_engine({**settings, **more}, log)

    def request(self, sequence: Sequence) -> Any:
        """vLLM's parameters, the same for all sequences."""
        return self.params

    def answer(self, sequence: Sequence, output: Any) -> TopK:
        """Flat prompt_logprobs -> TopK. Each position has the next token, then the k best.

        Raises RuntimeError for another number of entries.
        """
        flat = output.prompt_logprobs
        computed = len(sequence.input_ids) - 1
        if len(flat.token_ids) != computed * (self.k + 1):
            raise RuntimeError(
                f"document {sequence.doc_id!r}: vLLM returned {len(flat.token_ids)} entries for "
                f"{computed} positions, expected {self.k + 1} for each"
            )
        at = sequence.positions
        ids = np.asarray(flat.token_ids, np.int32).reshape(computed, -1)[at, 1:]
        logprobs = np.asarray(flat.logprobs, np.float32).reshape(computed, -1)[at, 1:]
        left = 1 - np.exp(logprobs.astype(np.float64)).sum(axis=1)
        return TopK.from_dense(ids, logprobs, np.log(np.maximum(left, self.SMALLEST_TAIL)))
