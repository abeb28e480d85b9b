"""Folders of save_to_disk: the files of state.json in their order, and none beside them."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from transformers import PreTrainedTokenizerBase

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.corpus_files import find_files
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from tests.helpers.corpora import some_texts

TEXTS = some_texts(9)


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> PreTrainedTokenizerBase:
    return ModelFolder(model_path).tokenizer


def saved(folder: Path, texts: list[str] = TEXTS, shards: int = 1, **columns: Any) -> Path:
    rows = {"text": texts, **columns}
    datasets.Dataset.from_dict(rows).save_to_disk(folder, num_shards=shards)
    return folder


def texts_of(folder: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[str]:
    corpus = Corpus(CorpusConfig(str(folder), **options), tokenizer, 5000)
    return [tokenizer.decode(each.input_ids[:-1]) for each in corpus.sequences()]


def test_all_shards_are_read_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert texts_of(saved(tmp_path / "a", shards=3), tokenizer) == TEXTS


def test_files_beside_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saved(tmp_path / "a", shards=3)
    whole = datasets.load_from_disk(tmp_path / "a")
    whole.map(lambda row: {"text": row["text"].upper()})  # cached in the same folder
    saved(tmp_path / "a", TEXTS[:4], shards=1)
    assert len(list((tmp_path / "a").glob("*.arrow"))) > 3
    assert texts_of(tmp_path / "a", tokenizer) == TEXTS[:4]


def test_one_split_of_a_dataset_dict(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    parts = {
        name: datasets.Dataset.from_dict({"text": TEXTS[at : at + 3]})
        for name, at in [("train", 0), ("train_sft", 3), ("other", 6)]
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "a")
    assert texts_of(tmp_path / "a", tokenizer) == TEXTS[:3]
    assert texts_of(tmp_path / "a", tokenizer, split="train_sft") == TEXTS[3:6]
    assert texts_of(tmp_path / "a" / "other", tokenizer) == TEXTS[6:]
    with pytest.raises(ConfigError, match=r"no split 'test'; .* train, train_sft, other"):
        texts_of(tmp_path / "a", tokenizer, split="test")


def test_a_split_that_a_single_dataset_has_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split 'test' is asked for, but"):
        find_files(str(saved(tmp_path / "a")), "test")


def test_chats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "n": 1}]]
    saved(tmp_path / "a", ["x"], messages=chats)
    corpus = Corpus(CorpusConfig(str(tmp_path / "a"), messages_column="messages"), tokenizer, 99)
    assert [corpus.text(at) for at in range(len(corpus))] == ["user: hi\nassistant: ho\n"]


def test_remote(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    whole.save_to_disk("memory://saved/a", num_shards=2)
    files = find_files("memory://saved/a")
    assert [Path(file).name for file in files] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    corpus = Corpus(CorpusConfig("memory://saved/a"), tokenizer, 5000)
    assert len(corpus) == len(TEXTS)
    fsspec.filesystem("memory").rm("/saved", recursive=True)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"_data_files": []}, "expected a list of files in _data_files"),
        ({"_data_files": "a.arrow"}, "expected a list of files in _data_files"),
        ({"_data_files": [{"filename": "../../b.arrow"}]}, "found '../../b.arrow'"),
        ({"_data_files": [{"filename": "secret.txt"}]}, "found 'secret.txt'"),
        ({"_data_files": ["a.arrow"]}, "found None"),
        ({"_data_files": [{"filename": "b.arrow"}]}, "b.arrow: no such file, but state.json"),
        ({"_data_files": [{"filename": "pipe.arrow"}]}, "pipe.arrow: no such file"),
        ({"_data_files": [{"filename": "away.arrow"}]}, "a link leads out of the directory"),
    ],
)
def test_a_forged_state_is_refused(tmp_path: Path, state: Any, words: str) -> None:
    saved(tmp_path / "a")
    (tmp_path / "away.arrow").touch()
    (tmp_path / "a" / "away.arrow").symlink_to(tmp_path / "away.arrow")
    os.mkfifo(tmp_path / "a" / "pipe.arrow")
    (tmp_path / "a" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=words):
        find_files(str(tmp_path / "a"))


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(ConfigError, match="no JSONL"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("content", ["[", "[1]", "{}", '{"_data_files": null}'])
def test_another_state_json_is_no_saved_dataset(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    (tmp_path / "a.arrow").touch()
    assert find_files(str(tmp_path)) == [str(tmp_path / "state.json")]
