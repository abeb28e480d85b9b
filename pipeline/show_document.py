"""Show one document as the model reads it, with its targets marked, before anything is run.

On a terminal targets are green; elsewhere they stand in ⟦…⟧. Special tokens are shown as the
tokenizer spells them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from pipeline.config import CorpusConfig, DumpConfig, EvalConfig, TrainConfig, held_out_texts
from pipeline.corpus import Corpus, Sequence
from pipeline.dump.plan import open_corpus
from pipeline.errors import ConfigError
from pipeline.foreign import printable
from pipeline.models.directory import ModelFolder
from pipeline.types import Json

Corpora = dict[str, Callable[[], Corpus]]
"""What opens each corpus of a script, by its setting."""

MARKS = ("⟦", "⟧")  # as `storage inspect` has them
GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
END_OF_LINE = "↵"  # before a line's end that is learnt: colour does not show it


def run(asked: str, settings: DumpConfig | TrainConfig | EvalConfig) -> Json:
    """Print the document that `asked` names, [CORPUS:]NUMBER; return its counts.

    Raises ConfigError for what is not there, and whatever opening the corpus raises.
    """
    name, _, number = asked.rpartition(":")
    corpora = corpora_of(settings)
    name = name or next(iter(corpora))
    if name not in corpora or not number.isascii() or not number.isdigit():
        raise ConfigError(
            f"--show_document {asked}: expected the number of a document, counted from 0, after "
            f"the name of its corpus and a colon where it is not the first of {', '.join(corpora)}"
        )
    corpus = corpora[name]()
    if int(number) >= len(corpus):
        raise ConfigError(
            f"--show_document {asked}: the corpus has {len(corpus):,} documents, counted from 0"
        )
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = "\n".join(lines(corpus, int(number), color))
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
    return counts(list(corpus.sequences(int(number), int(number) + 1)))


def corpora_of(settings: DumpConfig | TrainConfig | EvalConfig) -> Corpora:
    if isinstance(settings, DumpConfig):
        model = ModelFolder.find(settings.model, settings.revision)
        return {"corpus": partial(open_corpus, settings, model)}
    if isinstance(settings, TrainConfig):
        from pipeline.training.inputs import Inputs

        inputs = Inputs(settings)
        held_out = {f"held_out.{kind}": text for kind, text in held_out_texts(settings.held_out)}
        named = {"domain": settings.domain, **held_out}
        return {name: partial(inputs.opened, config) for name, config in named.items()}
    folder = ModelFolder.find(settings.models[settings.base])

    def opened(config: CorpusConfig) -> Corpus:
        return Corpus(config, folder.tokenizer, settings.max_length, settings.add_eos)

    return {kind: partial(opened, config) for kind, config in held_out_texts(settings)}


def counts(sequences: list[Sequence]) -> Json:
    return {
        "tokens": sum(len(each.input_ids) for each in sequences),
        "targets": sum(len(each.positions) for each in sequences),
        "sequences": len(sequences),
    }


def lines(corpus: Corpus, number: int, color: bool) -> Iterator[str]:
    """The document, one sequence after the other, each under a line with its counts."""
    sequences = list(corpus.sequences(number, number + 1))
    (doc_id,) = corpus.ids(number, number + 1)
    found = counts(sequences)
    yield printable(
        f"corpus {corpus.config.path}, document {number}, id {doc_id}: {found['tokens']:,} tokens, "
        f"{found['targets']:,} targets, in {found['sequences']} of at most {corpus.max_length:,}"
    )
    if not sequences:
        yield f"left out: nothing is learnt within its first {corpus.max_length:,} tokens"
        yield printable(corpus.text(number)) if corpus.tokens is None else ""
    for sequence in sequences:
        yield (
            f"--- chunk {sequence.chunk}: {len(sequence.input_ids):,} tokens, "
            f"{len(sequence.positions):,} targets"
        )
        yield "".join(marked(corpus.tokenizer, sequence, color))


def marked(tokenizer: Any, sequence: Sequence, color: bool) -> Iterator[str]:
    """The text of a sequence, with its targets marked."""
    ids = sequence.input_ids.tolist()
    is_target = np.zeros(len(ids), bool)
    is_target[sequence.positions + 1] = True
    for target, group in groupby(range(len(ids)), key=lambda at: bool(is_target[at])):
        places = list(group)
        text = printable(text_of(tokenizer, ids, places[0], places[-1] + 1))
        yield (in_color(text) if color else text.join(MARKS)) if target else text


def text_of(tokenizer: Any, ids: list[int], start: int, stop: int) -> str:
    """The text of some tokens; alone, the first one would lose its space in some tokenizers."""
    before = tokenizer.decode(ids[max(start - 1, 0) : start])
    whole: str = tokenizer.decode(ids[max(start - 1, 0) : stop])
    return whole.removeprefix(before)


def in_color(text: str) -> str:
    return GREEN + text.replace("\n", f"{END_OF_LINE}\n") + PLAIN
