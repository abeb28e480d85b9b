"""A store is made once, by whoever is there, and holds what the corpus holds."""

import copy
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import AddedToken

from pipeline import tokenized_parts
from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError, FailedError
from pipeline.models.directory import ModelFolder
from pipeline.positions import Share
from pipeline.token_sequences import TokenSequences, read_tokens
from pipeline.token_store import STORE
from pipeline.tokenized_parts import LOCKS, spans_of, start_helper, stored
from storage.targets import positions_of
from tests.helpers.chat_templates import CHATML, tokenizer_with
from tests.helpers.corpora import no_document, some_texts, write_jsonl, write_texts

CHATS = [
    [{"role": "user", "content": "ask " * at}, {"role": "assistant", "content": "say " * 9}]
    for at in range(12)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache/tokens"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some documents of these corpora a part."""
    monkeypatch.setattr(tokenized_parts, "PART_BYTES", 1000)
    monkeypatch.setattr(tokenized_parts, "HELPED", 1000)


@pytest.fixture
def texts(tmp_path: Path, model_path: Path) -> Any:
    """Opens a corpus of 12 texts."""
    path = write_texts(tmp_path / "texts.jsonl", ["", *some_texts(11)])
    tokenizer = ModelFolder(model_path).tokenizer
    return lambda **more: Corpus(CorpusConfig(str(path), **more), tokenizer, 50)


def chats(folder: Path, tokenizer: Any = None, **more: Any) -> Corpus:
    path = write_jsonl(folder / "chats.jsonl", [{"messages": each} for each in CHATS])
    config = CorpusConfig(str(path), messages_column="messages", targets="assistant", **more)
    return Corpus(config, tokenizer or tokenizer_with(CHATML), 50)


def check_same(text: TokenSequences, corpus: Corpus) -> None:
    expected = list(corpus.sequences())
    assert [(s.document, s.input_ids.tolist(), s.positions.tolist()) for s in expected] == [
        (document, one.input_ids.tolist(), one.positions.tolist())
        for document, one in zip(text.documents, text, strict=True)
    ]
    assert text.token_count == sum(len(s.input_ids) for s in expected)
    assert text.longest == max(len(s.input_ids) for s in expected)


@pytest.mark.usefixtures("small_parts")
def test_the_store_holds_the_sequences_of_the_corpus(tmp_path: Path, texts: Any) -> None:
    for corpus in (texts(), texts(skip=2, limit=7), chats(tmp_path)):
        assert len(spans_of(corpus)) > 1
        text = read_tokens(corpus)
        check_same(text, corpus)
        few = text.spread(5)
        assert [len(few), few.token_count, few.target_count, few.longest] == [
            5, few.lengths.sum(), few.target_counts.sum(), few.lengths.max(),
        ]  # fmt: skip
        chosen = [at * len(text) // 5 for at in range(5)]
        assert few.documents.tolist() == text.documents[chosen].tolist()
        assert [one.input_ids.tolist() for one in few] == [
            text[at].input_ids.tolist() for at in chosen
        ]


def test_the_second_start_reads_no_document(
    tmp_path: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> list[list[Any]]:
        return [
            [
                len(corpus), corpus.fingerprint(), corpus.rendering(), corpus.targets_identity(),
                corpus.splits_special, [one.input_ids.tolist() for one in read_tokens(corpus)],
            ]
            for corpus in (texts(), chats(tmp_path), texts(special_tokens="split"))
        ]  # fmt: skip

    first = start()
    no_document(monkeypatch)
    assert start() == first
    with pytest.raises(AssertionError, match="a document was read"):
        list(texts().sequences())


def test_stores_differ_where_tokens_may(tmp_path: Path, texts: Any) -> None:
    """Each of these is a key of its own; a share of the positions is drawn on reading."""
    plain = texts()
    tokenizer, config = plain.tokenizer, plain.config
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("ask")])
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = "x"
    keys = [
        each.store_folder.name
        for each in [
            plain, texts(skip=1), texts(limit=5), texts(special_tokens="split"),
            Corpus(config, tokenizer, 49), Corpus(config, tokenizer, 50, add_eos=False),
            Corpus(config, other, 50), Corpus(config, ended, 50),
            chats(tmp_path), chats(tmp_path, tokenizer_with(CHATML + " ")),
        ]
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert Corpus(config, tokenizer, 50, share=Share(0.5)).store_folder == plain.store_folder
    tokenizer("a", truncation=True, max_length=3)
    assert texts().store_folder == plain.store_folder


def parts_written(monkeypatch: pytest.MonkeyPatch, then: Any = lambda: None) -> list[str]:
    found, real = list[str](), tokenized_parts.write_part

    def noted(path: Path, rows: Any, schema: Any) -> None:
        real(path, rows, schema)
        found.append(path.name)
        then()

    monkeypatch.setattr(tokenized_parts, "write_part", noted)
    return found


@pytest.mark.usefixtures("small_parts")
def test_a_build_that_was_killed_goes_on(
    texts: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill() -> None:
        if len(written) == 2:
            raise Killed

    corpus = texts()
    names = [span.path.name for span in spans_of(corpus)]
    written = parts_written(monkeypatch, kill)
    with pytest.raises(Killed):
        stored(corpus)
    assert written == names[:2]
    left = corpus.store_folder / f".{names[2]}.abc.draft"  # a SIGKILL leaves it
    left.write_bytes(b"half")
    text = TokenSequences(texts())
    assert written == names
    assert {file.name for file in corpus.store_folder.iterdir()} == {*names, STORE, LOCKS}
    check_same(text, texts())


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("small_parts")
def test_a_part_that_another_process_works_on_comes_last(
    texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process holds the second part, and dies when all others are there."""
    corpus = texts()
    names = [span.path.name for span in spans_of(corpus)]
    corpus.store_folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, corpus.store_folder / LOCKS, "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"

    def die() -> None:
        if len(written) == len(names) - 1:
            holder.kill()

    written = parts_written(monkeypatch, die)
    stored(corpus)
    holder.communicate()
    assert written == [names[0], *names[2:], names[1]]
    check_same(TokenSequences(corpus), texts())


@pytest.mark.usefixtures("small_parts")
def test_a_file_system_without_locks(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    corpus = texts()
    other = tokenized_parts.drafts_of  # those of another live writer are left alone
    monkeypatch.setattr(tokenized_parts, "drafts_of", None)
    check_same(TokenSequences(corpus), texts())
    monkeypatch.setattr(tokenized_parts, "drafts_of", other)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def garble(path: Path) -> None:
    path.write_bytes(b"x" * (path.stat().st_size + 1))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("harm", [shorten, garble, Path.unlink])
@pytest.mark.parametrize("name", [0, STORE])
def test_a_damaged_store_is_mended(texts: Any, harm: Any, name: Any) -> None:
    corpus = texts()
    names = [span.path.name for span in spans_of(corpus)]
    stored(corpus)
    harm(corpus.store_folder / (name if name == STORE else names[name]))
    again = texts()
    assert again.store is None
    check_same(TokenSequences(again), texts())
    assert texts().store is not None


def test_a_bad_document_is_named_each_time(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHATS[0]}, {"messages": ["x"]}])
    config = CorpusConfig(str(path), messages_column="messages")
    for _ in range(2):
        corpus = Corpus(config, tokenizer_with(CHATML), 50)
        with pytest.raises(ConfigError, match=r"a\.jsonl, document 1: message 0: expected an obj"):
            stored(corpus)
    assert [file.name for file in corpus.store_folder.iterdir()] == [LOCKS]


def test_a_full_disk_is_an_outside_reason(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = texts()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.token_store.os.fsync", full)
    with pytest.raises(FailedError, match=r"token cache .*No space left.*HF_DATASETS_CACHE"):
        stored(corpus)
    assert [file.name for file in corpus.store_folder.iterdir()] == [LOCKS]


@pytest.mark.usefixtures("small_parts")
def test_helpers_are_one_for_each_core_and_end(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def sleeper(corpus: Corpus) -> Any:
        started.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr(tokenized_parts, "start_helper", sleeper)
    monkeypatch.setattr(tokenized_parts, "HELPED", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for ranks, expected in (("1", 3), ("2", 2), ("6", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        corpus = texts(skip=int(ranks))
        parts = len(spans_of(corpus))
        stored(corpus)
        assert len(started) == min(6 // int(ranks), parts) - 1, (expected, parts)
        assert all(each.poll() is not None for each in started)
        started.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_a_helper_makes_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it here, since nobody else works."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    corpus = chats(tmp_path)
    corpus.store_folder.mkdir(parents=True)
    assert start_helper(corpus).wait() == 0
    assert corpus.store is None
    written = parts_written(monkeypatch)
    found = chats(tmp_path)
    assert found.store is not None
    check_same(TokenSequences(found), found)
    assert written == []
    assert positions_of(found.store[0][1], len(found.store[0][0])).size
