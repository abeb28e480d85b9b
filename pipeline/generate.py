"""The base model writes the general corpus, as ordinary documents: DIRECTORY/00007.jsonl.

A file is one batch, made once and whole, and a function of the settings and its number: work that
was cut off goes on behind the last one. Documents that repeat themselves, are too short, or stand
already are dropped.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any, Protocol

from pipeline.config import GenerateConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.progress import Progress, say
from pipeline.recorded import refuse_other_settings
from pipeline.signals import stop_on_signals
from storage.store import Store

SETTINGS = "generation.settings"  # JSON; a name that no corpus is read from
WINDOW = 8  # tokens
BARREN = 20  # batches in a row without a document: the settings cannot work


class Generator(Protocol):
    """What writes: VllmGenerator, or a stand-in for it."""

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        temperature: float,
        top_p: float,
        stop: int | None,
    ) -> list[list[int]]: ...


def run(config: GenerateConfig) -> dict[str, Any]:
    """Write documents until there are `tokens`; returns documents, tokens, files, dropped.

    Raises ConfigError, RefusedError (the directory holds a corpus of other settings), StoreError.
    """
    from pipeline.teacher.vllm_generator import VllmGenerator

    model = ModelFolder.find(config.model, config.revision)
    dtype = model.dtype(config.dtype)
    progress = Progress(config.tokens, "token")
    progress.status = "starting vllm"
    try:
        with (
            stop_on_signals(limit=60.0),
            VllmGenerator(model, dtype, config.max_length, config.engine_args) as generator,
        ):
            return write(config, model.tokenizer, generator, progress)
    finally:
        progress.close()


def write(
    config: GenerateConfig, tokenizer: Any, generator: Generator, progress: Progress
) -> dict[str, Any]:
    """`run` with the engine given."""
    store = Store(config.output)
    claim(store, config)
    stop = tokenizer.eos_token_id
    starts = prompts_of(config, tokenizer)
    seen: set[bytes] = set()
    totals = {"documents": 0, "tokens": 0, "files": 0, "dropped": 0}
    progress.begin(config.tokens, 0)
    barren = 0
    while totals["tokens"] < config.tokens:
        number = totals["files"]
        name = f"{number:05d}.jsonl"
        data = store.read(name)
        if data is None:
            first = number * config.batch
            prompts = [starts[(first + i) % len(starts)] for i in range(config.batch)]
            seeds = [seed_of(config.seed, first + i) for i in range(config.batch)]
            answers = generator.generate(prompts, seeds, config.temperature, config.top_p, stop)
            data = documents(config, tokenizer, prompts, answers, first, seen)
            if not store.create(name, data):
                data = store.read(name) or b""  # another process was faster
        kept = [json.loads(line) for line in data.splitlines()]
        seen.update(digest(document["text"]) for document in kept)
        totals["files"] += 1
        totals["documents"] += len(kept)
        totals["tokens"] += sum(document["tokens"] for document in kept)
        totals["dropped"] += config.batch - len(kept)
        progress.update(totals["tokens"], lambda: f"{totals['documents']:,} documents")
        barren = 0 if kept else barren + 1
        if barren == BARREN:
            raise ConfigError(
                f"{BARREN * config.batch} documents in a row were dropped as short, repeating or "
                "known: raise temperature or max_repetition, lower min_length, or give prompts"
            )
    say(
        f"{config.output}: {totals['documents']:,} documents, {totals['tokens']:,} tokens; "
        f"{totals['dropped']:,} dropped"
    )
    return totals


def claim(store: Store, config: GenerateConfig) -> None:
    """Write the settings; RefusedError where the directory holds documents of other ones."""
    own = {**asdict(config), "output": None, "tokens": None}  # more tokens may be asked for later
    store.make_root()
    if not store.create(SETTINGS, (json.dumps(own, indent=1, sort_keys=True) + "\n").encode()):
        there = json.loads(store.read(SETTINGS) or b"{}")
        refuse_other_settings(store.path, there, json.loads(json.dumps(own)), "corpus")


def prompts_of(config: GenerateConfig, tokenizer: Any) -> list[list[int]]:
    """Token ids that documents start with."""
    if config.prompts is not None:
        corpus = Corpus(config.prompts, tokenizer, config.prompt_tokens, add_eos=False)
        starts = [s.input_ids.tolist() for s in corpus.sequences() if s.chunk == 0]
        if starts:
            return starts
        raise ConfigError(f"prompts {config.prompts.path}: no text of two tokens or more")
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [[token]]
    raise ConfigError(
        f"model {config.model}: its tokenizer has neither a begin nor an end-of-text token to "
        "start from; give prompts"
    )


def documents(
    config: GenerateConfig,
    tokenizer: Any,
    prompts: list[list[int]],
    answers: list[list[int]],
    first: int,
    seen: set[bytes],
) -> bytes:
    """The lines of one file: what is long enough, not degenerate, and new."""
    lines, here = [], set(seen)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = prompt if config.prompts is not None else []  # the end-of-text token is no text
        tokens = [*start, *answer]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if len(tokens) < config.min_length or repetition(tokens) > config.max_repetition:
            continue
        if not text.strip() or digest(text) in here:
            continue
        here.add(digest(text))
        document = {"id": f"generated-{first + number}", "text": text, "tokens": len(tokens)}
        lines.append(json.dumps(document, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def repetition(tokens: list[int]) -> float:
    """Share of the windows of WINDOW tokens that stood in the document before."""
    windows = [tuple(tokens[at : at + WINDOW]) for at in range(len(tokens) - WINDOW + 1)]
    return 1 - len(set(windows)) / len(windows) if windows else 0.0


def digest(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).lower().encode()).digest()[:16]


def seed_of(seed: int, number: int) -> int:
    data = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(data[:4], "little")
