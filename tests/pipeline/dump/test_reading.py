"""A process of one partition reads its own files, where it is sure which these are."""

import builtins
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from pipeline.config import CorpusConfig, DumpConfig
from pipeline.corpus_part import CorpusPart
from pipeline.dump import dump, reading
from pipeline.dump.plan import dump_there, open_corpus
from pipeline.dump.reading import open_own, write_list
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from storage import CorruptShard, Dump, PlanMismatch, verify
from storage.corpus_list import CorpusList, list_file
from storage.store import Store
from tests.helpers.corpora import some_texts, write_folder, write_jsonl
from tests.helpers.dumps import OPENING, rows, settings

COUNTS = [7, 4, 0, 9, 6, 4]  # documents of each file


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six files of 30 documents, some of which have an id."""
    texts = some_texts(30)
    texts[3] = texts[17] = ""
    documents = iter([{"text": text, "id": at or None} for at, text in enumerate(texts)])
    return write_folder(
        tmp_path / "corpus", [[next(documents) for _ in range(number)] for number in COUNTS]
    )


@pytest.fixture
def move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go to a machine of this name, with a cache of its own."""

    def go(name: str) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache-{name}")

    go("planner")
    return go


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> Counter[str]:
    """How often each file of the corpus was opened."""
    found, original = Counter[str](), builtins.open

    def noted(file: Any, *arguments: Any, **named: Any) -> Any:
        if not isinstance(file, int) and Path(file).parent == corpus:
            found[Path(file).name] += 1
        return original(file, *arguments, **named)

    monkeypatch.setattr(builtins, "open", noted)
    return found


@pytest.fixture
def config(tmp_path: Path, model_path: Path, corpus: Path) -> DumpConfig:
    return settings(tmp_path, model_path, corpus, partitions=4)


def plan(config: DumpConfig) -> Path:
    """Plan a dump; returns its list of the corpus's files."""
    dump.run(config, only="plan")
    name = list_file(Dump(config.output).plan)
    assert name is not None
    return Path(config.output) / name


def open_part(config: DumpConfig, partition: int | None) -> Any:
    there = dump_there(config.output)
    return open_own(config, ModelFolder(Path(config.model)), partition, there)


def spoil(file: Path) -> None:
    """Other bytes of the same number."""
    file.write_bytes(b"\xff" * file.stat().st_size)


def forge(path: Path, **changes: Any) -> None:
    """Change a list, with its checksum."""
    path.write_bytes(replace(CorpusList.unpack(path.read_bytes(), path.name), **changes).pack())


def test_machines_give_the_rows_of_one_process(
    tmp_path: Path,
    config: DumpConfig,
    corpus: Path,
    move: Callable[[str], None],
    opened: Counter[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On each machine, all files but its own hold something else."""
    dump.run(replace(config, output=str(tmp_path / "alone")))
    plan(config)
    good = shutil.copytree(corpus, tmp_path / "good")
    read: dict[int | None, list[int]] = {0: [0], 1: [1, 2, 3], 2: [2, 3, 4], 3: [4, 5], None: [0]}
    for index, numbers in read.items():
        move(str(index))
        names = {f"{number}.jsonl" for number in numbers}
        for file in good.iterdir():
            shutil.copy(file, corpus)
            if file.name not in names:
                spoil(corpus / file.name)
        opened.clear()
        found = dump.run(config, index, "finalize" if index is None else None)
        assert opened.keys() == names
        assert max(opened.values()) <= 3, "hashed, read, and hashed again"
    assert found["finished"]
    assert rows(config.output) == rows(tmp_path / "alone")
    assert verify(config.output).ok
    said = capsys.readouterr().err
    bytes_of = {at: (corpus / f"{at}.jsonl").stat().st_size / 1e3 for at in range(len(COUNTS))}
    own = f"{bytes_of[4] + bytes_of[5]:,.1f} kB of {sum(bytes_of.values()):,.1f} kB"
    assert f"partition 3 of 4: reads 2 of 6 files of the corpus, {own}" in said
    assert "finalize: reads 1 of 6 files" in said


def test_only_own_remote_files_are_copied(
    config: DumpConfig,
    corpus: Path,
    move: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fs = fsspec.filesystem("memory")
    for file in corpus.iterdir():
        fs.pipe(f"/shares/{file.name}", file.read_bytes())
    remote = replace(config, corpus=CorpusConfig("memory://shares"))
    copied, get_file = list[str](), type(fs).get_file

    def noted(self: Any, path: str, *arguments: Any, **named: Any) -> None:
        copied.append(Path(path).name)
        get_file(self, path, *arguments, **named)

    monkeypatch.setattr(type(fs), "get_file", noted)
    plan(remote)
    assert len(copied) == len(COUNTS)
    copied.clear()
    move("other")
    part = open_part(remote, 3)
    assert isinstance(part, CorpusPart)
    assert copied == ["4.jsonl", "5.jsonl"]
    here = open_part(config, 3)
    assert isinstance(here, CorpusPart), "the same corpus by another path"
    assert [each.doc_id for each in here.sequences(22, 30)] == [
        each.doc_id for each in part.sequences(22, 30)
    ]


def added(corpus: Path) -> None:
    write_jsonl(corpus / "9.jsonl", [{"text": "a"}])


def grown(corpus: Path) -> None:
    with (corpus / "0.jsonl").open("a") as file:
        file.write('{"text": "a"}\n')


def removed(corpus: Path) -> None:
    (corpus / "5.jsonl").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (added, r"9\.jsonl: not in the dump's list, here"),
        (grown, r"0\.jsonl: [\d,]+ bytes in the dump's list, [\d,]+ here"),
        (removed, r"5\.jsonl: [\d,]+ bytes in the dump's list, not here"),
    ],
)
def test_other_names_or_sizes_are_refused_unread(
    config: DumpConfig,
    corpus: Path,
    move: Callable[[str], None],
    opened: Counter[str],
    change: Callable[[Path], None],
    words: str,
) -> None:
    """Also of files that other partitions read, and before the engine starts."""
    plan(config)
    change(corpus)
    move("other")
    opened.clear()
    with pytest.raises(PlanMismatch, match=words):
        dump.run(config, 2)
    assert not opened


def test_a_change_of_the_same_size_is_found_by_whose_file_it_is(
    config: DumpConfig,
    corpus: Path,
    move: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan(config)
    file = corpus / "3.jsonl"
    file.write_bytes(file.read_bytes().replace(b"e", b"o"))
    move("other")
    monkeypatch.setattr(dump, "make_teacher", None)
    assert isinstance(open_part(config, 3), CorpusPart)
    for index in (1, 2):
        with pytest.raises(PlanMismatch, match=r"3\.jsonl: sha256: \w{64} in the list"):
            dump.run(config, index)


def test_a_tokenizer_that_reads_the_own_files_in_another_way_is_refused(
    tmp_path: Path, config: DumpConfig, move: Callable[[str], None]
) -> None:
    """The fingerprint of a tokenizer asks for a few texts alone."""
    plan(config)
    model = shutil.copytree(config.model, tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "The"}, "content": "th"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    move("other")
    with pytest.raises(PlanMismatch, match=r"\d\.jsonl: tokens of its first document"):
        dump.run(replace(config, model=str(model)), 3)


def unlisted(config: DumpConfig, path: Path) -> DumpConfig:
    path.unlink()
    return config


def torn(config: DumpConfig, path: Path) -> DumpConfig:
    path.write_bytes(path.read_bytes()[:100])
    return config


def other_digests(config: DumpConfig, path: Path) -> DumpConfig:
    forge(path, sha256=["0" * 64] * len(COUNTS))
    return config


def more_documents(config: DumpConfig, path: Path) -> DumpConfig:
    forge(path, documents=[8, *COUNTS[1:]])
    return config


def repeated_ids(config: DumpConfig, path: Path) -> DumpConfig:
    forge(path, ids_differ=False)
    return config


def reread(config: DumpConfig, path: Path) -> DumpConfig:
    return replace(config, corpus=replace(config.corpus, reread=True))


def few_partitions(config: DumpConfig, path: Path) -> DumpConfig:
    return replace(config, partitions=1)


def not_planned(config: DumpConfig, path: Path) -> DumpConfig:
    return replace(config, output=f"{config.output}-other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unlisted, "the dump has no list of the files"),
        (torn, "corpus-.*not valid JSON"),
        (other_digests, "does not fit"),
        (more_documents, "does not fit"),
        (repeated_ids, "the same id"),
        (reread, "corpus.reread"),
        (few_partitions, "in all of them"),
        (not_planned, "no plan yet"),
    ],
)
def test_where_the_list_does_not_do_all_is_read(
    config: DumpConfig,
    move: Callable[[str], None],
    opened: Counter[str],
    change: Callable[[DumpConfig, Path], DumpConfig],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = change(config, plan(config))
    move("other")
    opened.clear()
    found = open_part(changed, 0)
    assert not isinstance(found, CorpusPart)
    assert len(found) == sum(COUNTS)
    assert len(opened) == len(COUNTS)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"partition 0 of {changed.partitions}: takes the whole corpus, ")
    assert re.search(words, said)


def test_a_damaged_plan_is_not_read_for(
    config: DumpConfig, move: Callable[[str], None], opened: Counter[str]
) -> None:
    path = plan(config).with_name("plan.json")
    path.write_bytes(path.read_bytes()[:100])
    move("other")
    opened.clear()
    with pytest.raises(CorruptShard, match=r"plan\.json: not valid JSON"):
        dump.run(config, 1)
    assert not opened


def test_another_selection_is_refused_by_the_plan(
    config: DumpConfig, move: Callable[[str], None]
) -> None:
    plan(config)
    move("other")
    changed = replace(config, corpus=replace(config.corpus, skip=1))
    with pytest.raises(PlanMismatch, match=r"corpus\.documents: 30 in the dump, 29 asked for"):
        dump.run(changed, 1)


def test_documents_moved_from_file_to_file_in_the_list_are_refused(
    config: DumpConfig, move: Callable[[str], None]
) -> None:
    """By whoever reads one of these files."""
    forge(plan(config), documents=[6, 5, *COUNTS[2:]])
    move("other")
    for index in (0, 1):
        with pytest.raises(PlanMismatch, match=r"\.jsonl: documents: \d in the list"):
            open_part(config, index)


def test_processes_of_one_machine_share_its_cache(
    config: DumpConfig, move: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the planner, or of whoever else has read all."""
    plan(config)
    assert not isinstance(open_part(config, 1), CorpusPart)
    assert "this machine has its documents in the cache" in capsys.readouterr().err
    move("other")
    assert isinstance(open_part(config, 1), CorpusPart)
    open_corpus(config, ModelFolder(Path(config.model)))
    assert not isinstance(open_part(config, 1), CorpusPart)


def test_a_list_is_written_once(
    config: DumpConfig, corpus: Path, move: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the planner, or by any process that has read all; never over what is there."""
    path = plan(config)
    written = path.read_bytes()
    assert CorpusList.unpack(written, path.name).documents == COUNTS
    path.unlink()
    move("other")
    monkeypatch.setattr(dump, "make_teacher", None)
    with pytest.raises(TypeError):
        dump.run(config, 2)
    assert path.read_bytes() == written
    path.write_bytes(b"mine")
    plan(config)
    assert path.read_bytes() == b"mine"
    assert [fault for fault in verify(config.output, partial=True).faults if path.name in fault]


def test_of_two_planners_the_first_one_writes_the_list(
    config: DumpConfig, move: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the second one has not seen it."""
    path = plan(config)
    written = path.read_bytes()
    monkeypatch.setattr(Store, "exists", lambda self, name: False)
    other = replace(CorpusList.unpack(written, path.name), ids_differ=False)
    monkeypatch.setattr(reading, "list_of", lambda corpus: other)
    move("other")
    plan(config)
    assert path.read_bytes() == written


def test_opening_a_dump_takes_few_requests(
    config: DumpConfig, move: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The laws of sizing.py count them."""
    plan(config)
    move("other")
    asked, read = list[str](), Store.read

    def noted(self: Store, name: str, most: int | None = None) -> bytes | None:
        asked.append(name)
        return read(self, name, most)

    monkeypatch.setattr(Store, "read", noted)
    assert isinstance(open_part(config, 1), CorpusPart)
    assert len(asked) == OPENING


def test_what_gets_no_list(
    tmp_path: Path, config: DumpConfig, corpus: Path, move: Callable[[str], None]
) -> None:
    """A finished dump, also of an earlier release; a single file; what is too large to read."""
    single = replace(
        config, corpus=CorpusConfig(str(corpus / "0.jsonl")), output=str(tmp_path / "single")
    )
    dump.run(single, only="plan")
    model = ModelFolder(Path(config.model))
    path = plan(config)
    path.unlink()
    (Path(config.output) / "manifest.json").write_text("{}")
    write_list(Dump(config.output), open_corpus(config, model))
    (Path(config.output) / "manifest.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MOST_BYTES", 100)
        write_list(Dump(config.output), open_corpus(config, model))
    move("other")
    write_list(Dump(config.output), open_corpus(config, model))
    assert path.exists()
    path.unlink()
    open_part(config, 0)
    assert not list(tmp_path.glob("*/corpus-*.json"))


def test_a_hub_dataset_and_a_single_file_are_taken_whole(
    config: DumpConfig,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reading, "open_corpus", lambda config, model: config.corpus.path)
    for path in ("some/hub", str(corpus / "0.jsonl")):
        assert open_part(replace(config, corpus=CorpusConfig(path)), 2) == path
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said[0] == "partition 2 of 4: takes the whole corpus: it is a dataset of the hub"
    assert re.fullmatch(".*the whole corpus, [0-9.]+ kB: it is a single file", said[1])


def test_a_missing_corpus_is_bad_input(config: DumpConfig, move: Callable[[str], None]) -> None:
    gone = replace(config, corpus=CorpusConfig("/no/such/folder"))
    with pytest.raises(ConfigError, match="no such file"):
        open_part(gone, 0)
