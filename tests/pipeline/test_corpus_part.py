"""Parts of a corpus give the sequences that the whole corpus gives, and read their own files."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus, Sequence
from pipeline.corpus_files import find_files
from pipeline.corpus_part import CorpusPart
from pipeline.dump.partitions import documents_of
from pipeline.errors import ConfigError
from pipeline.listed_corpus import ListedCorpus, list_of
from pipeline.models.directory import ModelFolder
from pipeline.positions import Share
from storage.errors import PlanMismatch
from tests.helpers.corpora import some_texts, write_folder, write_jsonl

Document = dict[str, Any]
LENGTH = 64
COUNTS = [3, 0, 1, 6, 2, 4]  # documents of each file


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Any:
    return ModelFolder(model_path).tokenizer


def text(number: int) -> Document:
    return {"text": None if number % 5 == 2 else some_texts(20)[number][:300], "id": f"n{number}"}


def plain(number: int) -> Document:
    return {"text": some_texts(20)[number][:300]}


def chat(number: int) -> Document:
    words = some_texts(20)[number][:40]
    roles = ("user", words), ("assistant", words[:20]), ("user", "b"), ("assistant", words)
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def prompt(number: int) -> Document:
    return {"prompt": f"a {number}", "completion": None if number > 9 else some_texts(20)[number]}


def conversation(number: int) -> Document:
    """Those of the last files are null, so that they do not show what they are."""
    if number > 9:
        return {"prompt": None, "completion": None}
    made = chat(number)["messages"]
    return {"prompt": made[:1], "completion": made[1:2]}


def tokens(number: int) -> Document:
    ids = [7 + (number + at) % 300 for at in range(3 + 40 * (number % 4))]
    return {"ids": ids, "loss_mask": [at % 3 > 0 for at in range(len(ids))]}


KINDS: dict[str, tuple[Callable[[int], Document], dict[str, Any]]] = {
    "text": (text, {}),
    "without ids": (plain, {}),
    "chats": (chat, {"messages_column": "messages"}),
    "answers": (chat, {"messages_column": "messages", "targets": "assistant"}),
    "prompts": (prompt, {"prompt_column": "prompt", "completion_column": "completion"}),
    "conversations": (conversation, {"prompt_column": "prompt", "completion_column": "completion"}),
    "tokens": (tokens, {"tokens_column": "ids"}),
    "named mask": (tokens, {"tokens_column": "ids", "mask_column": "loss_mask"}),
    "no mask": (tokens, {"tokens_column": "ids", "targets": "all"}),
}


def write(folder: Path, make: Callable[[int], Document]) -> Path:
    numbers = iter(range(sum(COUNTS)))
    return write_folder(folder, [[make(next(numbers)) for _ in range(each)] for each in COUNTS])


def compared(sequences: Iterator[Sequence]) -> list[tuple[Any, ...]]:
    return [
        (
            *(each.doc_id, each.document, each.chunk, each.ends_document),
            each.input_ids.tolist(),
            None if each.targets is None else each.targets.tolist(),
        )
        for each in sequences
    ]


def part_of(whole: Corpus, which: range, **changes: Any) -> CorpusPart:
    listed = list_of(whole)
    assert listed is not None
    known = ListedCorpus(whole.config, whole.tokenizer, replace(listed, **changes), "")
    files = find_files(whole.config.path)
    return CorpusPart(known, files, which, whole.max_length, whole.add_eos, whole.share)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("skip", "limit", "share"), [(0, None, None), (2, 11, Share(0.5, 3))])
def test_parts_give_what_the_whole_gives(
    tmp_path: Path, tokenizer: Any, kind: str, skip: int, limit: int | None, share: Share | None
) -> None:
    make, options = KINDS[kind]
    path = str(write(tmp_path / "c", make))
    config = CorpusConfig(path, skip=skip, limit=limit, **options)
    whole = Corpus(config, tokenizer, LENGTH, True, share)
    listed = list_of(whole)
    assert listed is not None
    known = ListedCorpus(config, tokenizer, listed, whole.rendering()["sample"])
    assert known.is_decided
    assert known.fingerprint == whole.fingerprint()
    sequences = 0
    for index in range(4):
        first, stop = documents_of(index, 4, len(whole))
        which = known.holding(first, stop)
        assert len(which) < len(COUNTS)
        part = CorpusPart(known, whole.files, which, LENGTH, True, share)
        assert len(part.files) == len(which)
        assert (len(part), part.fingerprint()) == (len(whole), whole.fingerprint())
        assert part.rendering() == whole.rendering()
        assert part.targets_identity() == whole.targets_identity()
        found, expected = (compared(each.sequences(first, stop)) for each in (part, whole))
        assert found == expected
        sequences += len(found)
    assert sequences > 4


def test_errors_have_the_numbers_of_the_whole(tmp_path: Path, tokenizer: Any) -> None:
    folder = write(tmp_path / "c", prompt)
    other = [{"prompt": "a", "completion": "b"}, chat(0) | {"prompt": [], "completion": []}]
    write_jsonl(folder / "4.jsonl", other)
    whole = Corpus(CorpusConfig(str(folder), **KINDS["prompts"][1]), tokenizer, LENGTH)
    for corpus in (whole, part_of(whole, range(4, 5))):
        with pytest.raises(ConfigError, match="document 11: expected text in column 'prompt'"):
            list(corpus.sequences(10, 12))


def test_a_mask_that_the_first_document_lacks_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """Also where it is not in the part that the first document is."""
    folder = write(tmp_path / "c", lambda number: {"ids": tokens(number)["ids"]})
    whole = Corpus(CorpusConfig(str(folder), tokens_column="ids"), tokenizer, LENGTH)
    listed = list_of(whole)
    assert listed is not None
    write_jsonl(folder / "4.jsonl", [tokens(10), tokens(11)])
    known = ListedCorpus(whole.config, tokenizer, listed, "")
    with pytest.raises(PlanMismatch, match=r"4\.jsonl: sha256"):
        CorpusPart(known, whole.files, range(4, 5), LENGTH)
    content = (
        whole.digests[:4]
        + Corpus(
            CorpusConfig(str(folder / "4.jsonl"), tokens_column="ids"), tokenizer, LENGTH
        ).digests
    )
    known = replace(known, listed=replace(listed, sha256=[*content, ""]))
    with pytest.raises(ConfigError, match=r"4\.jsonl, line 1: has loss_mask"):
        CorpusPart(known, whole.files, range(4, 5), LENGTH)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sha256", "0" * 64, r"3\.jsonl: sha256: 0+ in the list"),
        ("documents", 7, r"3\.jsonl: documents: 7 in the list of the dump's files, 6 here"),
        ("samples", "0" * 16, r"3\.jsonl: tokens of its first document"),
    ],
)
def test_a_file_that_is_not_as_listed_is_refused(
    tmp_path: Path, tokenizer: Any, field: str, value: Any, words: str
) -> None:
    whole = Corpus(CorpusConfig(str(write(tmp_path / "c", text))), tokenizer, LENGTH)
    listed = list_of(whole)
    assert listed is not None
    changed = [*getattr(listed, field)]
    changed[3] = value
    part_of(whole, range(4, 6), **{field: changed})
    with pytest.raises(PlanMismatch, match=words):
        part_of(whole, range(2, 4), **{field: changed})


def test_only_own_files_are_read(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others hold something else by now, and their documents take no place."""
    whole = Corpus(CorpusConfig(str(write(tmp_path / "c", text))), tokenizer, LENGTH)
    listed = list_of(whole)
    assert listed is not None
    expected = compared(whole.sequences(10, 12))
    for number in (0, 1, 2, 3, 5):
        (tmp_path / "c" / f"{number}.jsonl").write_bytes(b"\xff")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    known = ListedCorpus(whole.config, tokenizer, listed, whole.rendering()["sample"])
    part = CorpusPart(known, whole.files, range(4, 5), LENGTH)
    assert compared(part.sequences(10, 12)) == expected
    assert len(part.every_document) == 2
    assert "repeats" not in vars(part.ids), "which takes memory for each document of the whole"
