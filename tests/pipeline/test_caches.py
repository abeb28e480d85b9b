"""Caches are listed, and what is old and ours and not in use goes."""

import os
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline import cache_use, caches, tokenized_parts
from pipeline.caches import entries, listed, main, removed
from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.errors import BAD_INPUT, DONE
from pipeline.models.directory import ModelFolder
from pipeline.token_sequences import TokenSequences
from pipeline.token_store import LOCKS
from pipeline.tokenized_parts import Locks, spans_of
from tests.helpers.corpora import some_texts, write_texts

KEY = "0" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def made(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A corpus with its store, in use; beside them a copy of a remote file, and a digest."""
    monkeypatch.setattr(tokenized_parts, "PART_BYTES", 1000)
    path = write_texts(tmp_path / "texts.jsonl", some_texts(6))
    corpus = Corpus(CorpusConfig(str(path)), ModelFolder(model_path).tokenizer, 50)
    TokenSequences(corpus)
    for name in ("remote/" + "a" * 20 + "/far.jsonl", f"digests/{KEY}.json"):
        file = tmp_path / "cache" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return corpus


def end_of_use() -> None:
    for file in cache_use.HELD.values():
        os.close(file)
    cache_use.HELD.clear()


def grow_old(folder: Path, days: float) -> None:
    then = time.time() - days * 86_400
    for path in [*folder.rglob("*"), *folder.rglob(".*")]:
        os.utime(path, (then, then))


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_everything_is_listed_with_its_size(
    made: Corpus, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = listed()
    assert [each.kind for each in entries()] == ["corpora", "tokens", "remote", "digests"]
    tokens = sum(file.stat().st_size for file in made.store_folder.iterdir())
    assert found["tokens"] == tokens
    assert found["digests"] == found["remote"] == 2
    said = capsys.readouterr().out
    assert f"used 0.0 days ago  {made.config.path}\n" in said
    assert "far.jsonl" in said


@pytest.mark.usefixtures("made")
def test_only_what_is_old_goes(cache: Path) -> None:
    end_of_use()
    grow_old(cache, 9.5)
    before = files_in(cache)
    assert sum(removed(10).values()) == 0
    assert files_in(cache) == before
    found = removed(9)
    assert all(found.values())
    assert files_in(cache) == set()
    assert [list((cache / kind).iterdir()) for kind in caches.NAMED] == [[], [], [], []]


def test_what_is_in_use_stays_and_works(made: Corpus, cache: Path) -> None:
    text = TokenSequences(made)
    grow_old(cache, 100)
    found = removed(1)
    assert found["digests"] == found["remote"] == 2
    assert found["tokens"] == found["corpora"] == 0
    assert len([one for one in text if len(one)]) == len(text)


def test_a_store_that_is_being_made_stays(made: Corpus, cache: Path, monkeypatch: Any) -> None:
    """By another process, for which a lock that is not granted stands."""
    end_of_use()
    (made.store_folder / "store.json").unlink()
    grow_old(cache, 100)
    taken: list[Any] = []

    def lockf(file: int, *given: Any) -> None:
        taken.append(given)
        raise BlockingIOError

    with monkeypatch.context() as patch:
        patch.setattr(caches.fcntl, "lockf", lockf)
        assert removed(1)["tokens"] == 0
    assert len(taken) == 1
    with Locks(made.store_folder / LOCKS) as locks, locks.taken(0, wait=True):
        pass
    assert removed(1)["tokens"] > 0
    assert not made.store_folder.exists()


def test_what_is_not_ours_stays(made: Corpus, cache: Path, tmp_path: Path) -> None:
    end_of_use()
    mine = ["corpora/mine.arrow", "tokens/mine/0-1.arrow", f"tokens/{made.store_folder.name}/mine",
            "remote/mine/a", "digests/mine.json", "mine/a"]  # fmt: skip
    for name in mine:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "0-1.arrow").write_text("mine")
    (cache / "tokens" / KEY).symlink_to(elsewhere)
    grow_old(cache, 100)
    removed(1)
    assert files_in(cache) == set(mine)
    assert (elsewhere / "0-1.arrow").exists()


@pytest.mark.usefixtures("made")
def test_what_is_half_done_stays_for_a_day(made: Corpus, cache: Path) -> None:
    end_of_use()
    for name in ("corpora/.building-x/a.arrow", "remote/.copying-x/content"):
        (cache / name).parent.mkdir(parents=True)
        (cache / name).write_text("half")
    span = spans_of(made)[0].path
    (span.parent / f".{span.name}.x.draft").write_text("half")
    grow_old(cache, 0.5)
    removed(0)
    assert files_in(cache) == {"corpora/.building-x/a.arrow", "remote/.copying-x/content"}
    grow_old(cache, 1.5)
    removed(0)
    assert files_in(cache) == set()


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["remove", "--older-than", "0.5"]) == DONE
    assert "0.0 MB removed" in capsys.readouterr().out
    for wrong in (["remove"], ["remove", "--older-than", "-1"], ["remove", "--older-than", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == BAD_INPUT
