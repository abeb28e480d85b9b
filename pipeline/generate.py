"""Generate the general corpus with the base model, as documents in DIRECTORY/00007.jsonl.

Each file holds one batch. It is written atomically and depends only on the settings and its number,
so an interrupted run resumes after the last file. Documents that are repetitive, too short, or
duplicates are dropped.
"""

import hashlib
import json
from typing import Any, Protocol

from pipeline.config import GenerateConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.places import check_output, inputs_of
from pipeline.progress import Progress, say
from pipeline.recorded import recorded, refuse_other_settings
from pipeline.signals import stop_on_signals
from storage.store import Store

SETTINGS = "generation.settings"  # JSON; a suffix that corpora ignore
WINDOW = 8  # tokens
BARREN = 20  # empty batches in a row after which the settings cannot work


class Generator(Protocol):
    """Generates token ids: VllmGenerator, or a fake in tests."""

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        temperature: float,
        top_p: float,
        stop: int | None,
    ) -> list[list[int]]: ...


def run(config: GenerateConfig) -> dict[str, Any]:
    """Write documents with `config.tokens` tokens in total; return the counts.

    The counts are documents, tokens, files and dropped. Raises ConfigError, RefusedError (the
    directory holds a corpus made with other settings), StoreError.
    """
    from pipeline.teacher.vllm_generator import VllmGenerator

    model = ModelFolder.find(config.model, config.revision)
    check_output(config.output, {**dict(inputs_of(config)), "model": str(model.path)})
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
    """Do the work of `run` with a given generator."""
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
                data = store.read(name) or b""  # another process wrote it first
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
                f"{BARREN * config.batch} documents in a row were dropped as too short, repetitive "
                "or duplicate: raise temperature or max_repetition, lower min_length, or set "
                "prompts"
            )
    say(
        f"{config.output}: {totals['documents']:,} documents, {totals['tokens']:,} tokens; "
        f"{totals['dropped']:,} dropped"
    )
    return totals


def claim(store: Store, config: GenerateConfig) -> None:
    """Record the settings. Raises RefusedError if the directory holds other settings."""
    own = {
        **recorded(config),
        "output": None,
        "tokens": None,
    }  # a later run may ask for more tokens
    store.make_root()
    if not store.create(SETTINGS, (json.dumps(own, indent=1, sort_keys=True) + "\n").encode()):
        there = json.loads(store.read(SETTINGS) or b"{}")
        refuse_other_settings(store.path, there, json.loads(json.dumps(own)), "corpus")


def prompts_of(config: GenerateConfig, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts, one list each, that documents start with."""
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
        "start from; set prompts"
    )


def documents(
    config: GenerateConfig,
    tokenizer: Any,
    prompts: list[list[int]],
    answers: list[list[int]],
    first: int,
    seen: set[bytes],
) -> bytes:
    """The JSON lines of one file: documents that are long enough, not repetitive, and new."""
    lines, here = [], set(seen)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = prompt if config.prompts is not None else []  # a special token is not text
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
    """Share of the windows of WINDOW tokens that repeat an earlier window of the document."""
    windows = [tuple(tokens[at : at + WINDOW]) for at in range(len(tokens) - WINDOW + 1)]
    return 1 - len(set(windows)) / len(windows) if windows else 0.0


def digest(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).lower().encode()).digest()[:16]


def seed_of(seed: int, number: int) -> int:
    data = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(data[:4], "little")
