"""Text generation with vLLM."""

from typing import Any

import torch

from pipeline.models.directory import ModelFolder
from pipeline.teacher.vllm_engine import check_interface, engine_settings, start_engine
from pipeline.teacher.vllm_log import VllmLog


class VllmGenerator:
    """Prompts in, sampled tokens out; each request has its own seed."""

    def __init__(
        self, model: ModelFolder, dtype: str, max_length: int, engine_args: dict[str, Any]
    ) -> None:
        check_interface()
        own: dict[str, Any] = {}
        if not torch.cuda.is_available():
            # vLLM 0.32 rewinds the generator of a seeded request whose prompt it has in parts, and
            # torch's generators of a CPU cannot be rewound: the engine would die.
            own["enable_chunked_prefill"] = False
        settings = engine_settings(model, dtype, max_length, {**own, **engine_args})
        self.log = VllmLog()
        with self.log.explained(model):
            self.engine = start_engine({**settings, "runner": "generate"}, self.log)
        self.max_length, self.requests = max_length, 0

    def __enter__(self) -> "VllmGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.engine_core.shutdown(timeout=30)
        self.log.remove()

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        temperature: float,
        top_p: float,
        stops: list[int],
    ) -> list[list[int]]:
        """Token ids that continue each prompt, up to the first that is one of `stops`, which is the
        last one then, or to max_length with the prompt."""
        from vllm import SamplingParams

        numbers: dict[str, int] = {}
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=self.max_length - len(prompt),
                stop_token_ids=stops,
                ignore_eos=True,  # without a tokenizer vLLM knows no eos; `stops` have it
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
                    found[numbers.pop(output.request_id)] = tokens
        return found
