"""Documents of every format become token sequences, and errors name what is wrong."""

import copy
import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from tests.helpers.corpora import some_texts, write_jsonl, write_texts

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(model_path: Path):  # type: ignore[no-untyped-def]
    return ModelFolder(model_path).tokenizer


@pytest.fixture
def open_corpus(tokenizer):  # type: ignore[no-untyped-def]
    def make(path: Path | str, max_length: int = 2048, **options: object) -> Corpus:
        config = CorpusConfig(str(path), **options)  # type: ignore[arg-type]
        return Corpus(config, tokenizer, max_length)

    return make


def decoded(corpus: Corpus) -> list[str]:
    """The text of each document, joined from its chunks."""
    texts: dict[int, list[int]] = {}
    for sequence in corpus.sequences():
        texts.setdefault(sequence.document, []).extend(sequence.input_ids)
    return [corpus.tokenizer.decode(ids[:-1]) for ids in texts.values()]


TEXTS = some_texts(5)


def as_jsonl(folder: Path) -> Path:
    return write_texts(folder / "a.jsonl", TEXTS)


def as_gzip(folder: Path) -> Path:
    path = folder / "a.jsonl.gz"
    path.write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return path


def as_zstd(folder: Path) -> Path:
    path = folder / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(as_jsonl(folder).read_bytes()))
    return path


def as_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS, "other": [1] * len(TEXTS)}), folder / "a.parquet")
    return folder / "a.parquet"


def as_text_files(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


def as_glob(folder: Path) -> str:
    write_texts(folder / "part-1.jsonl", TEXTS[:2])
    write_texts(folder / "part-2.jsonl", TEXTS[2:])
    return str(folder / "part-*.jsonl")


@pytest.mark.parametrize("write", [as_jsonl, as_gzip, as_zstd, as_parquet, as_text_files, as_glob])
def test_every_format_gives_the_same_documents(tmp_path: Path, open_corpus, write) -> None:  # type: ignore[no-untyped-def]
    assert decoded(open_corpus(write(tmp_path))) == TEXTS


def test_documents_end_with_eos_and_keep_their_ids(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"id": f"x{i}", "text": t} for i, t in enumerate(TEXTS)]
    )
    sequences = list(open_corpus(path).sequences())
    assert [s.doc_id for s in sequences] == [f"x{i}" for i in range(5)]
    assert all(s.input_ids[-1] == EOS and s.input_ids.dtype == np.int32 for s in sequences)


def ids_of(corpus: Corpus) -> list[str]:
    return [sequence.doc_id for sequence in corpus.sequences()]


def test_ids_that_begin_anew_in_each_file_are_made_different(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    for name in "ab":
        rows = [{"id": number, "text": "a b"} for number in range(2)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    corpus = open_corpus(tmp_path)
    assert ids_of(corpus) == ["0", "1", "0#2", "1#3"]
    parts = [s.doc_id for at in range(4) for s in corpus.sequences(at, at + 1)]
    assert parts == ids_of(corpus)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, None], ["1", "1#1"]),
        (["", ""], ["", "#1"]),
        (["a", "a", "a#1"], ["a", "a#1#", "a#1"]),
        (["a#1", "a", "a"], ["a#1", "a", "a#2"]),
        (["b", "a", "c", None], ["b", "a", "c", "3"]),
        ([None, None], ["0", "1"]),
    ],
)
def test_equal_ids(tmp_path: Path, open_corpus, given: list, expected: list[str]) -> None:  # type: ignore[no-untyped-def]
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": id, "text": "a b"} for id in given])
    assert ids_of(open_corpus(path)) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([None, 0, 1, "", "0", "0#1", "0#2", "#1", "1#"]), min_size=1))
def test_ids_are_different_and_ordinary_ones_stay(tokenizer, ids: list) -> None:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "a.jsonl", [{"id": id, "text": "a b"} for id in ids])
        corpus = Corpus(CorpusConfig(str(path)), tokenizer, 99)
        found = ids_of(corpus)
    own = [str(at if id is None else id) for at, id in enumerate(ids)]
    assert len(set(found)) == len(ids)
    assert [found[at] for at in range(len(own)) if own[at] not in own[:at]] == list(
        dict.fromkeys(own)
    )


def test_long_documents_are_chunked_without_loss(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    corpus = open_corpus(write_texts(tmp_path / "a.jsonl", TEXTS), max_length=16)
    sequences = list(corpus.sequences())
    assert max(len(s.input_ids) for s in sequences) == 16
    assert decoded(corpus)[4] == TEXTS[4]
    last = [s for s in sequences if s.document == 4]
    assert [s.chunk for s in last] == list(range(len(last)))
    assert [s.ends_document for s in last] == [False] * (len(last) - 1) + [True]


def test_empty_documents_have_no_sequence(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ["", "one two", None, "x" * 9]])
    assert [s.document for s in open_corpus(path).sequences()] == [1, 3]


def test_messages_go_through_the_chat_template(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    corpus = open_corpus(path, messages_column="messages")
    (sequence,) = corpus.sequences()
    assert corpus.tokenizer.decode(sequence.input_ids) == "user: hi\nassistant: ho\n"


def test_a_bad_chat_names_its_document(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    good = {"messages": [{"role": "user", "content": "hi"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [good, good, {"messages": ["x"]}])
    with pytest.raises(ConfigError, match=r"a\.jsonl, document 2: message 0: expected an object"):
        list(open_corpus(path, messages_column="messages").sequences())


def test_empty_chats_have_no_sequence(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    chats = [[], None, [{"role": "user", "content": "hi"}]]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    corpus = open_corpus(path, messages_column="messages")
    assert [sequence.document for sequence in corpus.sequences()] == [2]


@pytest.fixture(scope="module")
def framing(tokenizer):  # type: ignore[no-untyped-def]
    """A tokenizer that puts <bos> before each text and <eos> behind it."""
    fast = copy.deepcopy(tokenizer)
    fast.add_special_tokens({"bos_token": "<bos>"})
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", fast.bos_token_id), ("<eos>", EOS)]
    )
    return fast


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", "<bos>a b<eos>"),
        ("<bos>a b", "<bos>a b<eos>"),
        ("<bos>a b<eos>", "<bos>a b<eos>"),
        ("<bos><bos>a b", "<bos><bos>a b<eos>"),
        ("a <bos>b", "<bos>a <bos>b<eos>"),
    ],
)
@pytest.mark.parametrize("add_eos", [True, False])
def test_bos_and_eos_are_not_doubled(
    tmp_path: Path,
    framing,  # type: ignore[no-untyped-def]
    text: str,
    expected: str,
    add_eos: bool,
) -> None:
    path = write_texts(tmp_path / "a.jsonl", [text])
    (sequence,) = Corpus(CorpusConfig(str(path)), framing, 99, add_eos).sequences()
    assert framing.decode(sequence.input_ids) == expected


def test_large_documents_go_to_the_tokenizer_one_by_one(
    tmp_path: Path,
    open_corpus,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    whole = open_corpus(path)
    assert [len(batch) for batch in whole.batches(0, 5)] == [5]
    expected = [sequence.input_ids.tolist() for sequence in whole.sequences()]
    monkeypatch.setattr("pipeline.corpus.CHARACTERS_AT_ONCE", 60)
    assert [len(batch) for batch in whole.batches(0, 5)] == [1] * 5
    assert [sequence.input_ids.tolist() for sequence in whole.sequences()] == expected


def test_skip_limit_and_ranges_select_documents(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    corpus = open_corpus(path, skip=1, limit=3)
    assert decoded(corpus) == TEXTS[1:4]
    assert [s.document for s in corpus.sequences(1, 2)] == [1]


def test_fingerprint_follows_content_and_selection(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    first = open_corpus(path).fingerprint()
    assert open_corpus(path).fingerprint() == first
    assert open_corpus(path, limit=4).fingerprint() != first
    write_texts(path, [*TEXTS[:4], TEXTS[4] + "."])
    assert open_corpus(path).fingerprint() != first


@pytest.mark.parametrize(
    ("path", "options", "fingerprint"),
    [
        ("", {}, "d12861e4cb7a37811491b09a6b8329acac33eaaa6161c26754cea35830fbe19b"),
        (
            "a.jsonl",
            {"skip": 1, "limit": 1},
            "66c6d2d3dea782155ec10bf6eda908eb662824a423f885b2764744843e2d1726",
        ),
        ("*.jsonl", {}, "57bef87896655e714c6b76243b58584882ceaf874893672d8880b0b961de8b0e"),
    ],
)
def test_fingerprints_are_those_of_earlier_releases(
    tmp_path: Path,
    open_corpus,  # type: ignore[no-untyped-def]
    path: str,
    options: dict,
    fingerprint: str,
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "one two three"}\n{"text": "four five"}\n')
    (tmp_path / "sub/b.jsonl").write_text('{"text": "six"}\n')
    assert open_corpus(tmp_path / path, **options).fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"body": "x y z"}\n', "no column 'text'; it has body"),
        (b"", "empty"),
        (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "line 2: not UTF-8 (byte 0xe9"),
        (b'{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
        (b'{"text": 5}\n', "expected text in column 'text', found int"),
    ],
)
def test_bad_files_say_what_is_wrong(
    tmp_path: Path,
    open_corpus,  # type: ignore[no-untyped-def]
    content: bytes,
    words: str,
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)

    def read() -> None:
        corpus = open_corpus(path)
        corpus.fingerprint()
        list(corpus.sequences())

    with pytest.raises(ConfigError) as error:
        read()
    assert words in str(error.value)
    assert "bad.jsonl" in str(error.value)


def test_bad_paths_say_what_is_wrong(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.docx").write_text("x")
    for path, words in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "*.nothing", "no such file"),
        (tmp_path / "empty", "no JSONL, Parquet or text file"),
        (tmp_path / "odd.docx", "unknown kind of file"),
    ]:
        with pytest.raises(ConfigError, match=words):
            open_corpus(path)
    with pytest.raises(ConfigError, match="after skip=9"):
        open_corpus(write_texts(tmp_path / "a.jsonl", TEXTS), skip=9)


def test_json_rows_are_not_reordered(tmp_path: Path, open_corpus) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(200)))
    assert decoded(open_corpus(path)) == [f"number {i}" for i in range(200)]
