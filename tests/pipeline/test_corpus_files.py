"""Which files are read: by stated rules, and never more than was named."""

import os
from pathlib import Path

import pytest

from pipeline.corpus_files import find_files
from pipeline.errors import ConfigError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    return root


def found(root: Path, path: str = "", split: str = "train") -> list[str]:
    return [os.path.relpath(file, root) for file in find_files(str(root / path), split)]


@pytest.mark.parametrize("name", ["part[1].jsonl", "a*.jsonl", "what?.jsonl", "s3::x.jsonl"])
def test_a_file_that_exists_is_no_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make(tmp_path, name, "part1.jsonl", "ab.jsonl", "what1.jsonl")
    assert found(tmp_path, name) == [name]
    monkeypatch.chdir(tmp_path)
    assert find_files(name) == [str(tmp_path / name)]


def test_files_in_a_folder_with_brackets(tmp_path: Path) -> None:
    make(tmp_path, "c[1]/a.jsonl", "c1/b.jsonl")
    assert found(tmp_path, "c[1]") == ["c[1]/a.jsonl"]


NOT_DATA = [
    ".two.jsonl",
    "._one.jsonl",
    ".ipynb_checkpoints/one-checkpoint.jsonl",
    "_delta_log/0.json",
    "__MACOSX/one.jsonl",
    "dataset_infos.json",
    "sub/.hidden/x.jsonl",
    "notes.docx",
]


def test_a_directory_leaves_out_what_is_hidden_or_no_data(tmp_path: Path) -> None:
    make(tmp_path, "one.jsonl", "sub/two.jsonl", *NOT_DATA, "README.md", "LICENSE.txt")
    assert found(tmp_path) == ["one.jsonl", "sub/two.jsonl"]
    assert found(tmp_path, "*.jsonl") == ["one.jsonl"]
    assert found(tmp_path, "**/*.jsonl") == ["one.jsonl", "sub/two.jsonl"]


def test_text_about_the_texts_is_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "README.md", "readme_de.txt", "LICENCE.txt", "copying.md", "reading.md")
    assert found(tmp_path) == ["a.txt", "reading.md"]
    assert found(tmp_path, "*") == ["a.txt", "reading.md"]


def test_what_is_named_is_read(tmp_path: Path) -> None:
    make(tmp_path, ".cache/a.jsonl", "a/README.md", "b/README.md", "b/other.md", "_x.jsonl")
    assert found(tmp_path, ".cache") == [".cache/a.jsonl"]
    assert found(tmp_path, ".cache/a.jsonl") == [".cache/a.jsonl"]
    assert found(tmp_path, "*/README.md") == ["a/README.md", "b/README.md"]
    assert found(tmp_path, "_*.jsonl") == ["_x.jsonl"]
    assert found(tmp_path, ".*/*.jsonl") == [".cache/a.jsonl"]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "train", [0]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "test", [1]),
        (["wiki_train.jsonl", "wiki_valid.jsonl"], "train", [0]),
        (["wiki_train.jsonl", "wiki_valid.jsonl"], "validation", [1]),
        (["en/train.jsonl.gz", "en/dev.jsonl.gz"], "train", [0]),
        (["train/a.txt", "test/a.txt"], "train", [0]),
        (["wiki.train.txt", "contest.txt", "latest-news.txt"], "train", [0, 1, 2]),
        (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], "test_sft", [1]),
        (["a.jsonl", "b.jsonl"], "train", [0, 1]),
        (["train.jsonl", "more.jsonl"], "train", [0, 1]),
        (["test drive.txt", "other.txt"], "train", [0, 1]),
    ],
)
def test_a_directory_has_the_splits_of_its_names(
    tmp_path: Path, names: list[str], split: str, chosen: list[int]
) -> None:
    make(tmp_path, *names)
    assert sorted(found(tmp_path, split=split)) == sorted(names[at] for at in chosen)


@pytest.mark.parametrize(
    ("names", "path", "split", "words"),
    [
        (["test.jsonl"], "", "train", "no file of the split 'train'; there are files of test"),
        (["test.jsonl", "more.jsonl"], "", "train", "belongs to no split. Name the files"),
        (["a.jsonl"], "", "test", "does not have it in its name"),
        (["a.jsonl"], "a.jsonl", "test", "does not have it in its name"),
        (["a.jsonl"], "*.jsonl", "test", "does not have it in its name"),
        (["test.jsonl", "more.jsonl"], "", "test", "does not have it in its name"),
    ],
)
def test_a_split_that_is_not_there(
    tmp_path: Path, names: list[str], path: str, split: str, words: str
) -> None:
    make(tmp_path, *names)
    with pytest.raises(ConfigError, match=words):
        found(tmp_path, path, split)


def test_a_named_file_may_be_of_any_split(tmp_path: Path) -> None:
    make(tmp_path, "test.jsonl", "test-2.jsonl")
    assert found(tmp_path, "test.jsonl") == ["test.jsonl"]
    assert found(tmp_path, "test.jsonl", split="test") == ["test.jsonl"]
    assert found(tmp_path, "test*.jsonl") == ["test-2.jsonl", "test.jsonl"]


@pytest.mark.parametrize("path", ["c", "c/*.txt", "c/**/*.txt"])
def test_a_link_out_of_the_directory_is_refused(tmp_path: Path, path: str) -> None:
    make(tmp_path, "secret", "c/a.txt")
    (tmp_path / "c/notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"notes\.txt: a link leads out of the directory"):
        found(tmp_path, path)
    assert found(tmp_path, "c/notes.txt") == ["c/notes.txt"]


def test_a_linked_folder_is_refused_outside_and_read_once_inside(tmp_path: Path) -> None:
    make(tmp_path, "c/a.txt", "secrets/b.txt")
    (tmp_path / "c/loop").symlink_to(tmp_path / "c")
    assert found(tmp_path, "c") == ["c/a.txt"]
    (tmp_path / "c/more").symlink_to(tmp_path / "secrets")
    with pytest.raises(ConfigError, match="more: a link leads out"):
        found(tmp_path, "c")


def test_the_cache_of_the_hub_may_have_links(tmp_path: Path) -> None:
    repo = make(tmp_path / "datasets--a--b", "blobs/123", "snapshots/main/data/x")
    (repo / "snapshots/main/data/train-0.parquet").symlink_to(repo / "blobs/123")
    snapshot = repo / "snapshots/main"
    assert found(snapshot) == ["data/train-0.parquet"]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="no such file"):
        found(tmp_path, "a.jsonl")
    make(tmp_path, "b.jsonl")
    assert found(tmp_path) == ["b.jsonl"]


def test_another_spelling_finds_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "c/a.jsonl")
    monkeypatch.chdir(tmp_path)
    for path in ["c", "./c/", f"file://{tmp_path}/c", "c/*.jsonl", "c/../c/a.jsonl"]:
        assert find_files(path) == [str(tmp_path / "c/a.jsonl")], path
