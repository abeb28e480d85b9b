"""Generate the general corpus with the base model, as documents in DIRECTORY/00007.jsonl.

Each file holds one batch. It is written atomically and depends only on the settings and its number,
so an interrupted run resumes after the last file. Documents that are repetitive, too short, or
duplicates are dropped.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

from pipeline.config import GenerateConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.models.generation import end_ids
from pipeline.places import check_output, inputs_of
from pipeline.progress import Progress, say
from pipeline.recorded import recorded, refuse_other_settings
from pipeline.replies import Replies
from pipeline.signals import stop_on_signals
from pipeline.types import Json
from storage.store import Store

SETTINGS = "generation.settings"  # JSON; a suffix that corpora ignore
WINDOW = 8  # tokens
BARREN = 20  # empty batches in a row after which the settings cannot work

Written = tuple[list[Json], Counter[str]]
"""The documents of a file, and why others were dropped."""


class Generator(Protocol):
    """Generates token ids: VllmGenerator, or a fake in tests."""

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        temperature: float,
        top_p: float,
        stops: list[int],
    ) -> list[list[int]]: ...


Engine = Callable[[], Generator]
"""Starts the generator, or gives the one that runs."""


class Author(Protocol):
    """Writes the documents of each file: JSON objects with id and tokens."""

    advice: str
    """What to do where every document is dropped."""

    def is_done(self, totals: Json) -> bool:
        """Whether so many files or tokens are enough."""

    def tried(self, number: int) -> int:
        """Documents of a file before any is dropped."""

    def write(self, generator: Generator, number: int, seen: set[bytes]) -> Written:
        """`seen` has the digests of the documents of earlier files."""


def run(config: GenerateConfig) -> dict[str, Any]:
    """Write documents with `config.tokens` tokens in total; return the counts.

    The counts are documents, tokens, files, dropped, and why they were. Raises ConfigError,
    RefusedError (the directory holds a corpus made with other settings), StoreError.
    """
    from pipeline.teacher.vllm_generator import VllmGenerator

    model = ModelFolder.find(config.model, config.revision)
    check_output(config.output, {**dict(inputs_of(config)), "model": str(model.path)})
    dtype = model.dtype(config.dtype)
    progress = Progress(config.tokens or 0, "token")
    progress.status = "reading prompts and the model's files"
    try:
        with stop_on_signals(limit=60.0), ExitStack() as stack:
            author = author_of(config, model.tokenizer, end_ids(model))

            @cache
            def engine() -> Generator:
                progress.status = "starting vllm"
                started = stack.enter_context(
                    VllmGenerator(model, dtype, config.max_length, config.engine_args)
                )
                progress.begin()
                progress.status = f"writing the first {config.batch} documents"
                return started

            return write_files(config, claimed(config), author, engine, progress)
    finally:
        progress.close()


def write(
    config: GenerateConfig,
    tokenizer: Any,
    generator: Generator,
    progress: Progress,
    ends: Sequence[int] = (),
) -> dict[str, Any]:
    """Do the work of `run` with a given generator. `ends` are the ids that end any text."""
    author = author_of(config, tokenizer, ends)
    return write_files(config, claimed(config), author, lambda: generator, progress)


def write_files(
    config: GenerateConfig, store: Store, author: Author, engine: Engine, progress: Progress
) -> dict[str, Any]:
    seen: set[bytes] = set()
    totals: dict[str, Any] = {"documents": 0, "tokens": 0, "files": 0, "dropped": 0}
    why: Counter[str] = Counter()
    progress.begin(config.tokens or 0, 0)
    barren = 0
    while not author.is_done(totals):
        number = totals["files"]
        kept, reasons = batch(store, author, engine, number, seen)
        seen.update(map(digest, kept))
        why.update(reasons)
        totals["files"] += 1
        totals["documents"] += len(kept)
        totals["tokens"] += sum(document["tokens"] for document in kept)
        totals["dropped"] += author.tried(number) - len(kept)
        progress.update(totals["tokens"], lambda: f"{totals['documents']:,} documents")
        barren = 0 if kept else barren + author.tried(number)
        if barren >= BARREN * config.batch or (author.is_done(totals) and not totals["documents"]):
            raise ConfigError(
                f"{barren} documents in a row were dropped: {listed(why)}. {author.advice}"
            )
    say(
        f"{config.output}: {totals['documents']:,} documents, {totals['tokens']:,} tokens; "
        f"{totals['dropped']:,} dropped" + (f": {listed(why)}" if why else "")
    )
    return totals | {"why": dict(why)}


def listed(why: Counter[str]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in why.most_common())


def batch(
    store: Store, author: Author, engine: Engine, number: int, seen: set[bytes]
) -> tuple[list[Json], dict[str, int]]:
    """(the documents of a file, why others were dropped), written now where it is not there."""
    name, reasons = f"{number:05d}.jsonl", f"{number:05d}.dropped"
    data = store.read(name)
    if data is None:
        documents, dropped = author.write(engine(), number, seen)
        data = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in documents).encode()
        store.create(reasons, json.dumps(dropped).encode())
        if not store.create(name, data):
            data = store.read(name) or b""  # another process wrote it first
    return list(map(json.loads, data.splitlines())), json.loads(store.read(reasons) or b"{}")


def claimed(config: GenerateConfig) -> Store:
    """The output, with the settings. Raises RefusedError if the directory holds other settings."""
    store = Store(config.output)
    own = {
        **recorded(config),
        "output": None,
        "tokens": None,
    }  # a later run may ask for more tokens
    store.make_root()
    if not store.create(SETTINGS, (json.dumps(own, indent=1, sort_keys=True) + "\n").encode()):
        there = json.loads(store.read(SETTINGS) or b"{}")
        refuse_other_settings(store.path, there, json.loads(json.dumps(own)), "corpus")
    return store


def author_of(config: GenerateConfig, tokenizer: Any, ends: Sequence[int]) -> Author:
    if config.replies is not None:
        return Answering(config, Replies(config, tokenizer, list(ends)))
    return Continuing(config, tokenizer)


class Continuing:
    """Continues the beginnings of texts, or writes from nothing."""

    advice = "Raise temperature or max_repetition, lower min_length, or set prompts"

    def __init__(self, config: GenerateConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.starts = starts_of(config, tokenizer)
        eos = tokenizer.eos_token_id
        self.stops = [] if eos is None else [eos]

    def is_done(self, totals: Json) -> bool:
        return bool(totals["tokens"] >= (self.config.tokens or 0))

    def tried(self, number: int) -> int:
        return self.config.batch

    def write(self, generator: Generator, number: int, seen: set[bytes]) -> Written:
        config = self.config
        numbers = range(number * config.batch, (number + 1) * config.batch)
        prompts = [self.starts[at % len(self.starts)] for at in numbers]
        seeds = [seed_of(config.seed, at) for at in numbers]
        answers = generator.generate(prompts, seeds, config.temperature, config.top_p, self.stops)
        filtered = Filter(config, seen)
        for at, prompt, answer in zip(numbers, prompts, answers, strict=True):
            start = prompt if config.prompts is not None else []  # a special token is not text
            tokens = [*start, *(answer[:-1] if answer[-1:] == self.stops else answer)]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            filtered.add({"id": f"generated-{at}", "text": text, "tokens": len(tokens)}, [tokens])
        return filtered.written


class Answering:
    """Lets the base answer conversations, each once in every round."""

    advice = "Look at prompts and max_length; raise temperature or max_repetition"

    def __init__(self, config: GenerateConfig, replies: Replies) -> None:
        self.config, self.replies = config, replies
        self.conversations = len(replies.corpus)
        self.in_round = math.ceil(self.conversations / config.batch)  # files

    def is_done(self, totals: Json) -> bool:
        if self.config.tokens is None:
            return bool(totals["files"] >= self.in_round)
        return bool(totals["tokens"] >= self.config.tokens)

    def span(self, number: int) -> range:
        """The documents of a file; no file has those of two rounds."""
        first = number % self.in_round * self.config.batch
        return range(first, min(first + self.config.batch, self.conversations))

    def tried(self, number: int) -> int:
        return len(self.span(number))

    def write(self, generator: Generator, number: int, seen: set[bytes]) -> Written:
        config, span = self.config, self.span(number)
        first = number // self.in_round * self.conversations + span.start
        filtered = Filter(config, seen)

        def answers(
            prompts: list[list[int]], numbers: list[int], turn: int, ends: list[int]
        ) -> list[list[int]]:
            seeds = [seed_of(config.seed, number, turn) for number in numbers]
            return generator.generate(prompts, seeds, config.temperature, config.top_p, ends)

        for each in self.replies.answered(span, first, answers):
            if each.dropped:
                filtered.dropped[each.dropped] += 1
            else:
                document = {"id": f"generated-{each.number}", "messages": each.messages}
                tools = {} if each.tools is None else {"tools": each.tools}
                filtered.add(document | tools | {"tokens": each.tokens}, each.answers)
        return filtered.written


class Filter:
    """Documents of one file that are long enough, not repetitive, and new."""

    def __init__(self, config: GenerateConfig, seen: set[bytes]) -> None:
        self.config, self.seen = config, set(seen)
        self.kept: list[Json] = []
        self.dropped: Counter[str] = Counter()

    @property
    def written(self) -> Written:
        return self.kept, self.dropped

    def add(self, document: Json, written: list[list[int]]) -> None:
        """Keep a document, or count why not. `written` has the token ids that the base wrote."""
        why = self.why_not(document, written)
        if why:
            self.dropped[why] += 1
        else:
            self.kept.append(document)
            self.seen.add(digest(document))

    def why_not(self, document: Json, written: list[list[int]]) -> str | None:
        if document["tokens"] < self.config.min_length or not text_of(document).strip():
            return "too short"
        if max(map(repetition, written)) > self.config.max_repetition:
            return "repetitive"
        return "there already" if digest(document) in self.seen else None


def starts_of(config: GenerateConfig, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts, one list each, that documents start with."""
    if config.prompts is not None:
        prompts = replace(config.prompts, targets="all")  # also where a mask has others
        corpus = Corpus(prompts, tokenizer, config.prompt_tokens, add_eos=False)
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


def repetition(tokens: list[int]) -> float:
    """Share of the windows of WINDOW tokens that repeat an earlier window of the document."""
    windows = [tuple(tokens[at : at + WINDOW]) for at in range(len(tokens) - WINDOW + 1)]
    return 1 - len(set(windows)) / len(windows) if windows else 0.0


def text_of(document: Json) -> str:
    """The text that makes a document another one."""
    if "text" in document:
        return str(document["text"])
    return json.dumps([[each["role"], each.get("content")] for each in document["messages"]])


def digest(document: Json) -> bytes:
    text = " ".join(text_of(document).split()).lower()
    return hashlib.sha256(text.encode()).digest()[:16]


def seed_of(seed: int, number: int, turn: int = 0) -> int:
    """The seed of a document, or of an answer within it."""
    name = f"{seed} {number}" + (f" {turn}" if turn else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
