"""Token corpora of every format: the same sequences, and errors that name file and row."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from pipeline import corpus_readers
from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus, Sequence
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from tests.helpers.corpora import write_jsonl

ROWS = [
    {"id": "a", "input_ids": [5, 6, 7, 8], "loss_mask": [1, 0, 0, 1]},
    {"id": "b", "input_ids": [9], "loss_mask": [1]},
    {"id": "c", "input_ids": [], "loss_mask": []},
    {"id": "d", "input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]},
    {"id": "e", "input_ids": [0, 0, 511, 0, 4], "loss_mask": [1, 1, 1, 0, 0]},
]
"""All, a token, no token, no target, and a chunk without a target where five are cut in two."""


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> PreTrainedTokenizerBase:
    return ModelFolder(model_path).tokenizer


@pytest.fixture
def opened(tokenizer: PreTrainedTokenizerBase) -> Any:
    def make(path: Path, max_length: int = 100, **options: Any) -> Corpus:
        options = {"tokens_column": "input_ids", **options}
        return Corpus(CorpusConfig(str(path), **options), tokenizer, max_length)

    return make


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(folder / "a.jsonl", rows)


def as_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "a.json").write_text(json.dumps(rows))
    return folder / "a.json"


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def as_arrow(folder: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return folder / "a.arrow"


def as_saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


FORMATS = pytest.mark.parametrize("write", [as_jsonl, as_json, as_parquet, as_arrow, as_saved])


def parts(sequences: list[Sequence]) -> list[Any]:
    return [
        (
            each.doc_id,
            each.chunk,
            each.input_ids.tolist(),
            None if each.targets is None else each.targets.tolist(),
            each.ends_document,
        )
        for each in sequences
    ]


@FORMATS
def test_masked_documents(tmp_path: Path, opened: Any, write: Any) -> None:
    path = write(tmp_path, ROWS)
    corpus = opened(path, max_length=3)
    expected = [("e", 0, [0, 0, 511], [True, True, True], True)]
    assert parts(list(corpus.sequences())) == expected
    assert corpus.masked
    assert corpus.targets_identity() == {"which": "mask"}
    whole = list(opened(path).sequences())
    assert [(each.doc_id, each.positions.tolist()) for each in whole] == [("a", [2]), ("e", [0, 1])]


@FORMATS
@pytest.mark.parametrize("masks", [{}, {"targets": "all"}])
def test_documents_without_a_mask(tmp_path: Path, opened: Any, write: Any, masks: Any) -> None:
    rows = [{"id": each["id"], "input_ids": each["input_ids"]} for each in ROWS]
    corpus = opened(write(tmp_path, ROWS if masks else rows), max_length=3, **masks)
    assert parts(list(corpus.sequences())) == [
        ("a", 0, [5, 6, 7], None, True),
        ("d", 0, [1, 2, 3], None, True),
        ("e", 0, [0, 0, 511], None, False),
        ("e", 1, [0, 4], None, True),
    ]
    assert not corpus.masked
    assert corpus.targets_identity() == {}


@FORMATS
@pytest.mark.parametrize("named", [{}, {"mask_column": "labels"}])
def test_labels(tmp_path: Path, opened: Any, write: Any, named: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]
    (found,) = opened(write(tmp_path, rows), **named).sequences()
    assert found.positions.tolist() == [1]


@FORMATS
def test_labels_of_classes_are_no_mask(
    tmp_path: Path, opened: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [5, 6], "labels": 0}]
    path = write(tmp_path, rows)
    capsys.readouterr()
    assert [each.targets for each in opened(path).sequences()] == [None, None]
    assert capsys.readouterr().err == ""


def test_a_loss_mask_comes_before_labels(
    tmp_path: Path, opened: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "loss_mask": [0, 0, 1]}]
    path = as_jsonl(tmp_path, rows)
    assert [each.positions.tolist() for each in opened(path).sequences()] == [[1]]
    (line,) = capsys.readouterr().err.splitlines()
    assert "the column loss_mask says which tokens are learnt" in line
    named = opened(path, mask_column="labels")
    assert [each.positions.tolist() for each in named.sequences()] == [[0, 1]]
    assert capsys.readouterr().err == ""


def test_other_columns_are_not_read(tmp_path: Path, opened: Any) -> None:
    rows = [{"tokens": [5, 6], "keep": [True, True], "input_ids": "x", "loss_mask": 0, "id": 7}]
    path = as_jsonl(tmp_path, rows)
    (found,) = opened(path, tokens_column="tokens", mask_column="keep").sequences()
    assert found.input_ids.tolist() == [5, 6]
    assert found.doc_id == "7"


@FORMATS
def test_ids_may_be_in_the_column_id(tmp_path: Path, opened: Any, write: Any) -> None:
    corpus = opened(write(tmp_path, [{"id": [5, 6]}, {"id": [7] * 5000}]), tokens_column="id")
    (first, *_) = corpus.sequences()
    assert (first.doc_id, first.input_ids.tolist()) == ("0", [5, 6])


@FORMATS
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1, 512]}, "id 512 at token 1"),
        ({"input_ids": None}, "found null|no column 'input_ids'"),
        ({"loss_mask": [1, 0, 1]}, "2 tokens in 'input_ids', but 3 marks"),
        ({"loss_mask": None}, "column 'loss_mask', found null"),
        ({"input_ids": [1, None]}, "found null at token 1"),
    ],
)
def test_bad_documents_name_file_and_place(
    tmp_path: Path, opened: Any, write: Any, row: dict[str, Any], words: str
) -> None:
    good = {"input_ids": [1, 2], "loss_mask": [1, 1]}
    path = write(tmp_path, [good] * 20 + [{**good, **row}])
    places = {as_jsonl: "a.jsonl, line 21", as_json: "a.json, item 20"}
    name = {as_parquet: "a.parquet", as_arrow: "a.arrow"}.get(write, "arrow")
    with pytest.raises(ConfigError, match=words) as error:
        opened(path)
    assert places.get(write, f"{name}, row 20") in str(error.value)


@pytest.mark.parametrize("write", [as_parquet, as_arrow, as_saved])
@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("input_ids", [1.0, 2.0], "found a list of double"),
        ("input_ids", [[1], [2]], "found a list of list"),
        ("input_ids", 7, "expected a list of whole numbers in column 'input_ids', found int"),
        ("input_ids", "1 2", "found string"),
        ("loss_mask", [0.0, 1.0], "found a list of double"),
    ],
)
def test_columns_of_another_type(
    tmp_path: Path, opened: Any, write: Any, column: str, value: Any, words: str
) -> None:
    row = {"input_ids": [1, 2], "loss_mask": [1, 1], column: value}
    with pytest.raises(ConfigError, match=f"row 0: .*{words}"):
        opened(write(tmp_path, [row]))


@FORMATS
@pytest.mark.parametrize("options", [{}, {"mask_column": "labels"}])
def test_missing_columns_are_named(
    tmp_path: Path, opened: Any, write: Any, options: dict[str, Any]
) -> None:
    rows = [{"input_ids": [1, 2]} if options else {"tokens": [1, 2]}]
    missing = "labels" if options else "input_ids"
    with pytest.raises(ConfigError, match=f"no column '{missing}'; it has .*Set corpus.tokens"):
        opened(write(tmp_path, rows), **options)


@pytest.mark.parametrize("column", ["input_ids", "text"])
def test_text_files_hold_no_tokens(tmp_path: Path, opened: Any, column: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=f"no column '{column}'; it has text"):
        opened(tmp_path / "a.txt", tokens_column=column)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("format", ["json", "parquet"])
def test_a_mask_of_some_documents_only_is_refused(
    tmp_path: Path, opened: Any, first: bool, format: str
) -> None:
    rows: list[dict[str, Any]] = [{"input_ids": [1, 2], "loss_mask": [0, 1]}, {"input_ids": [1, 2]}]
    rows = rows if first else rows[::-1]
    if format == "json":
        as_jsonl(tmp_path, rows)
    else:
        as_parquet(tmp_path, rows[1:]).rename(tmp_path / "b.parquet")
        as_parquet(tmp_path, rows[:1])
    with pytest.raises(ConfigError, match=r"a.jsonl, line 2|b.parquet: has .* which tokens are"):
        opened(tmp_path)
    assert len(opened(tmp_path, targets="all")) == 2


def test_an_empty_file_does_not_decide(tmp_path: Path, opened: Any) -> None:
    (tmp_path / "0.jsonl").write_text("\n")
    as_jsonl(tmp_path, ROWS)
    assert opened(tmp_path).masked


def test_what_a_dump_depends_on(tmp_path: Path, opened: Any) -> None:
    path = as_jsonl(tmp_path, ROWS)
    corpora = [
        opened(path),
        opened(path, targets="all"),
        opened(path, mask_column="loss_mask"),
    ]
    one, two, three = (each.fingerprint() for each in corpora)
    assert one == three != two
    assert len({json.dumps(each.rendering()) for each in corpora}) == 1
    as_jsonl(tmp_path, [*ROWS[:3], {**ROWS[3], "input_ids": [1, 2, 4]}, ROWS[4]])
    assert opened(path).rendering() != corpora[0].rendering()
    assert opened(path).fingerprint() != one


def test_what_is_cached_was_checked_against_this_vocabulary(tmp_path: Path, opened: Any) -> None:
    path = as_jsonl(tmp_path, [{"input_ids": [511, 1]}])
    corpus = opened(path)
    corpus.tokenizer = None
    assert [each.input_ids.tolist() for each in corpus.sequences()] == [[511, 1]]
    assert corpus.documents.features["input_ids"].feature.dtype == "int32"

    class Smaller:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 510}

    with pytest.raises(ConfigError, match="line 1: id 511 at token 0"):
        Corpus(CorpusConfig(str(path), tokens_column="input_ids"), Smaller(), 9)  # type: ignore[arg-type]


def test_a_hub_dataset(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}] * 3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    corpus = opened("some/name", skip=1)
    assert [each.positions.tolist() for each in corpus.sequences()] == [[0], [0]]
    assert all(each.input_ids.dtype == np.int32 for each in corpus.sequences())
    found = datasets.Dataset.from_list([{"input_ids": [5, 6]}, {"input_ids": [5, 512]}])
    with pytest.raises(ConfigError, match="some/name, document 1: id 512 at token 1"):
        list(opened("some/name").sequences())
    with pytest.raises(ConfigError, match=r"some/name: no column 'labels'; it has input_ids\. Set"):
        opened("some/name", mask_column="labels")


def test_long_rows_are_refused_before_they_are_copied(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_readers, "DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr("pipeline.token_source.LINE_BYTES", 1 << 20)
    monkeypatch.setattr("pipeline.token_columns.numbers", None)
    rows = [{"input_ids": [1] * (1 << 18)}, {"input_ids": [2]}]
    with pytest.raises(ConfigError, match=r"a\.arrow, row 0: document of more than"):
        opened(as_arrow(tmp_path, rows))
    for size in (1, 4):  # the footer says it, or the values
        table = pa.Table.from_pylist([*rows, *rows[1:] * 6])
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=size)
        assert (tmp_path / "a.parquet").stat().st_size < 10_000
        with pytest.raises(ConfigError, match=r"a\.parquet, row 0.*: document of more than"):
            opened(tmp_path / "a.parquet")


def test_equal_numbers_are_not_unpacked_to_be_refused(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.token_source.LINE_BYTES", 1 << 20)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    as_parquet(tmp_path, [{"input_ids": [1] * (1 << 19)}])
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    with pytest.raises(ConfigError, match=r"a\.parquet, row 0: document of more than"):
        opened(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"messages_column": "messages"}, "messages_column and tokens_column"),
        ({"tokens_column": None, "mask_column": "m"}, "mask_column: .* set tokens_column"),
        ({"targets": "assistant"}, "targets assistant: .*Name a mask_column"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CorpusConfig("x", **{"tokens_column": "input_ids", **options})
