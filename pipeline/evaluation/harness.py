"""lm-evaluation-harness, with its requests answered by packed forwards.

The harness makes the prompts, tokenizes them, and turns log-likelihoods into scores, so scores are
its own. Only the forward is ours: sequences are packed without padding, the head reads the
positions of the options alone, and the options of a question share one reading of it.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import torch
from lm_eval import evaluator
from lm_eval.api import task as harness_task
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.chats import BadChat, ChatTemplate
from pipeline.errors import ConfigError
from pipeline.evaluation.branches import Branched, logprobs, longest_branched
from pipeline.evaluation.compare import batches
from pipeline.progress import Progress
from pipeline.types import Json

VERSION = version("lm_eval")
MOST_AT_ONCE = 64  # texts that are written at a time
SHOTS_SEED = 1234  # the harness's own default

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, then as token ids."""


class Asked(NamedTuple):
    """What is read for some requests."""

    read: Branched
    requests: list[list[int]]
    """Of each branch, which requests have it before their last token."""

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.read)


class PackedLM(HFLM):
    """A model whose log-likelihoods come from packed rows of at most `batch_tokens` tokens.

    `model` keeps packed sequences apart (`models.attention.enable_packing`). Log-likelihoods are
    taken in float32 whatever the dtype of the weights, where HFLM takes the model's own.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int
    ) -> None:
        with quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer)
        self.batch_tokens = batch_tokens
        self.shared = longest_branched(model)

    def apply_chat_template(
        self, chat_history: list[Json], add_generation_prompt: bool = True
    ) -> str:
        """A prompt as a chat, rendered within the bounds of chat_renderer.py.

        Raises ConfigError, also for a task that begins the assistant's answer itself.
        """
        if not add_generation_prompt:
            raise ConfigError(
                "tasks: chat: a task with a gen_prefix writes the beginning of the answer, which "
                "cannot be done in a chat here. Leave chat out"
            )
        try:
            template = ChatTemplate(self.tokenizer)
            try:
                return template.prompt(chat_history)
            except BadChat:  # some templates know no system's message; the harness drops it, too
                own = [message for message in chat_history if message["role"] != "system"]
                if own == chat_history:
                    raise
                return template.prompt(own)
        except BadChat as error:
            raise ConfigError(f"tasks: chat: {error}") from error.__cause__

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what the model would write) of each request."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        work, done = Progress(len(requests), "option"), 0
        try:
            groups = asked(requests, self.max_length, self.shared)
            for batch in batches(groups, self.batch_tokens):
                answers = [those for group in batch for those in group.requests]
                logs = logprobs(self.model, [group.read for group in batch])
                for those, log in zip(answers, logs, strict=True):
                    for at in those:
                        found[at] = scored(log, requests[at][2])
                    done += len(those)
                work.update(done, lambda: "options")
        finally:
            work.close()
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The written answers, at most `batch_tokens` tokens at a time, prompts included."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        order = sorted(range(len(requests)), key=lambda at: -lengths[at])
        found = [""] * len(requests)
        work, done = Progress(len(requests), "answer"), 0
        try:
            while done < len(order):
                written = requests[order[done]].args[1].get("max_gen_toks", self.max_gen_toks)
                fits = self.batch_tokens // (lengths[order[done]] + int(written))
                self.batch_size_per_gpu = min(max(1, fits), MOST_AT_ONCE)
                chosen = order[done : done + self.batch_size_per_gpu]
                texts = super().generate_until([requests[at] for at in chosen], disable_tqdm=True)
                for at, text in zip(chosen, texts, strict=True):
                    found[at] = text
                done += len(chosen)
                work.update(done, lambda: "written answers")
        finally:
            work.close()
        return found


def asked(requests: Iterable[Request], longest: int, shared: int) -> list[Asked]:
    """The requests by context, each cut at the left to `longest` tokens.

    A context with several continuations is read once where all of it has at most `shared` tokens,
    and otherwise once for each.
    """
    found: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for at, (_, context, continuation) in enumerate(requests):
        cut = max(0, len(context) + len(continuation) - 1 - longest)
        if cut >= len(context):
            raise ConfigError(
                f"tasks: an answer of {len(continuation):,} tokens, and the model reads at most "
                f"{longest:,}. Use shorter options"
            )
        # Nothing follows the last token, so it is not read.
        branches = found.setdefault(tuple(context[cut:]), {})
        branches.setdefault(tuple(continuation[:-1]), []).append(at)
    groups = []
    for kept, after in found.items():
        whole = Asked(Branched(kept, tuple(after)), list(after.values()))
        parts = [Asked(Branched(kept, (one,)), [those]) for one, those in after.items()]
        groups += [whole] if len(whole) <= shared else parts
    return groups


def scored(logprobs: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """(log-likelihood, whether each token is the most likely) from [answered, V]."""
    labels = torch.tensor(continuation, device=logprobs.device)[-len(logprobs) :]
    rows = logprobs[-len(labels) :]
    total = rows.gather(1, labels[:, None]).double().sum()
    return float(total), bool((rows.argmax(1) == labels).all())


def named_task(name: str, folder: str | None) -> dict[str, ConfigurableTask]:
    """The tasks of lm-evaluation-harness under a name, which may be a group's: of the folder's, or
    without one of the harness's own, whose thousands of files take seconds to list.

    Raises whatever the harness, its files and the hub raise.
    """
    with quiet():
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        loaded = manager.load([name])
    found: dict[str, ConfigurableTask] = loaded["tasks"]
    return found


def answers(
    model: PackedLM,
    tasks: dict[str, ConfigurableTask],
    limit: int | None,
    shots: int | None,
    chat: bool,
) -> dict[str, list[Json]]:
    """What the harness knows of each question, by task: its `samples`."""
    for task in tasks.values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(SHOTS_SEED)
    with quiet():
        found = evaluator.evaluate(
            model, tasks, limit=limit, bootstrap_iters=0, apply_chat_template=chat
        )
    samples: dict[str, list[Json]] = found["samples"]
    return samples


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's bars and warnings, which are about its own command line."""
    log, bar = logging.getLogger("lm_eval"), harness_task.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    harness_task.tqdm = lambda values, **_: values
    try:
        yield
    finally:
        log.setLevel(level)
        harness_task.tqdm = bar
