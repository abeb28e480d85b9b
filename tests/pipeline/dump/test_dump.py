"""Stage one through the real code and the real script, with transformers as the teacher."""

import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import cli
from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.dump import dump
from pipeline.dump.plan import open_corpus
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from storage import (
    Dump,
    IncompleteDump,
    InvalidRecord,
    LogitDataset,
    PlanMismatch,
    Record,
    ShardWriter,
    verify,
)
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_jsonl, write_texts
from tests.helpers.dumps import rows, settings
from tests.helpers.models import tiny_model


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """30 documents; two of them have no token to predict."""
    texts = some_texts(30)
    texts[3] = texts[17] = ""
    return write_texts(tmp_path / "corpus.jsonl", texts)


def test_dump_holds_the_top_k_of_the_model(tmp_path: Path, model_path: Path, corpus: Path) -> None:
    summary = dump.run(settings(tmp_path, model_path, corpus))
    assert (summary["documents"], summary["skipped"], summary["finished"]) == (28, 2, True)
    assert verify(tmp_path / "dump").ok
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path)
    dataset = LogitDataset(tmp_path / "dump")
    assert max(dataset.lengths) == 100
    for record in [dataset[0], dataset[len(dataset) - 1]]:
        ids = torch.from_numpy(record.input_ids[None].astype(np.int64))
        expected = model(ids).logits[0, :-1].log_softmax(-1).topk(8)
        # Entries that are equal on the grid have no order.
        found, wanted = (np.sort(ids, axis=1) for ids in (record.topk.dense()[0], expected.indices))
        np.testing.assert_array_equal(found, wanted)
        gap = roots(record.topk.dense()[1]) - roots(expected.values.detach().numpy())
        assert np.abs(gap).max() < dataset.plan["step"]


def roots(logprobs: Any) -> Any:
    return np.exp(logprobs / 2)


def test_a_corpus_tokenized_before_gives_the_same_rows(
    tmp_path: Path, model_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, model_path, corpus)
    text = Corpus(config.corpus, ModelFolder(model_path).tokenizer, 10**6)
    whole = [{"id": each.doc_id, "input_ids": each.input_ids} for each in text.sequences()]
    pq.write_table(pa.Table.from_pylist(whole), tmp_path / "tokens.parquet")
    tokens = CorpusConfig(str(tmp_path / "tokens.parquet"), tokens_column="input_ids")
    other = replace(config, corpus=tokens, output=str(tmp_path / "other"), add_eos=False)
    dump.run(config)
    dump.run(other)
    assert rows(config.output) == rows(other.output)
    assert max(each.chunk for each in LogitDataset(other.output)) > 0
    again = replace(other, corpus=replace(tokens, path=str(tmp_path / "moved.parquet")))
    (tmp_path / "tokens.parquet").rename(tmp_path / "moved.parquet")
    with pytest.raises(PlanMismatch, match=r"corpus\.fingerprint"):
        dump.run(replace(again, corpus=replace(again.corpus, limit=3)))


def test_a_share_of_the_positions_is_that_of_the_whole_dump(
    tmp_path: Path, model_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows, distributions, counts and the line that is printed."""
    dump.run(settings(tmp_path, model_path, corpus))
    few = settings(tmp_path, model_path, corpus, output=str(tmp_path / "few"), positions=0.2)
    summary = dump.run(few)
    assert verify(few.output).ok
    every = {(each.doc_id, each.chunk): each for each in LogitDataset(tmp_path / "dump")}
    dataset = LogitDataset(few.output)
    tokens = targets = 0
    for record in dataset:
        whole = every[record.doc_id, record.chunk]
        tokens, targets = tokens + len(record.input_ids), targets + len(record.positions)
        np.testing.assert_array_equal(record.input_ids, whole.input_ids)
        at = record.positions
        found, wanted = (
            np.sort(ids, axis=1) for ids in (record.topk.dense()[0], whole.topk.dense()[0][at])
        )
        np.testing.assert_array_equal(found, wanted)
        gap = roots(record.topk.dense()[1]) - roots(whole.topk.dense()[1][at])
        # A head may round another number of rows in another way.
        assert np.abs(gap).max() < dataset.plan["step"] + 1e-3
    assert (summary["tokens"], summary["targets"]) == (tokens, targets)
    possible = sum(len(each.positions) for each in every.values())
    assert abs(targets - 0.2 * possible) < 5 * np.sqrt(0.16 * possible)
    assert summary["bytes_per_target"] == pytest.approx(summary["bytes"] / targets)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{tokens:,} tokens, {targets:,} of them targets," in said
    assert f"{summary['bytes_per_target']:.1f} bytes per target" in said


def test_a_dump_with_masks_starts_shards_by_targets_and_counts_what_it_skips(
    tmp_path: Path, model_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On any number of partitions the rows are the same; another choice of targets is refused."""
    config = settings(tmp_path, model_path, corpus, positions=0.02, shard_tokens=20)
    summary = dump.run(config)
    shards = Dump(config.output).shards()
    assert len(shards) > 1
    assert all(20 <= shard.marker["positions"] < 120 for shard in shards[:-1])
    assert summary["skipped"] > 2
    assert summary["documents"] == len({key[0] for key in rows(config.output)})
    assert summary["documents"] + summary["skipped"] == 30
    said = capsys.readouterr().err
    assert f"{summary['skipped']} documents skipped (under two tokens, or without a target)" in said
    again = replace(config, output=str(tmp_path / "parts"), partitions=7)
    dump.run(again)
    assert rows(again.output) == rows(config.output)
    with pytest.raises(PlanMismatch, match=r"targets\.positions_seed: 0 in the dump, 1 asked for"):
        dump.run(replace(config, positions_seed=1))
    with pytest.raises(PlanMismatch, match=r"targets: .* in the dump, None asked for"):
        dump.run(replace(config, positions=1.0))


@pytest.mark.parametrize("labels", [False, True])
def test_a_token_corpus_with_masks_is_dumped_at_its_targets(
    tmp_path: Path, model_path: Path, labels: bool
) -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 512, length) for length in (5, 40, 130, 2, 99)]
    masks = [rng.random(len(each)) < 0.3 for each in tokens]
    masks[3][:] = False
    named = {"id": [str(at) for at in range(5)], "input_ids": tokens}
    marks = [
        np.where(mask, each, -100) if labels else mask
        for each, mask in zip(tokens, masks, strict=True)
    ]
    table = pa.table(named | {"labels" if labels else "loss_mask": marks})
    pq.write_table(table, tmp_path / "tokens.parquet")
    corpus = CorpusConfig(str(tmp_path / "tokens.parquet"), tokens_column="input_ids")
    config = replace(settings(tmp_path, model_path, tmp_path), corpus=corpus)
    whole = replace(config, corpus=replace(corpus, targets="all"), output=str(tmp_path / "all"))
    dump.run(config)
    dump.run(whole)
    assert verify(config.output).ok
    assert Dump(config.output).plan["targets"] == {"version": 1, "which": "mask"}
    expected = {(each.doc_id, each.chunk): each for each in LogitDataset(whole.output)}
    found = list(LogitDataset(config.output))
    assert {each.doc_id for each in found} == {str(at) for at in range(5) if masks[at][1:].any()}
    assert sum(len(each.positions) for each in found) == sum(
        mask[first + 1 : first + 100].sum() for mask in masks for first in (0, 100)
    )
    for record in found:
        mask = masks[int(record.doc_id)][record.chunk * 100 :][: len(record.input_ids)]
        assert record.targets is not None
        np.testing.assert_array_equal(record.targets[1:], mask[1:])
        other = expected[record.doc_id, record.chunk]
        np.testing.assert_array_equal(record.input_ids, other.input_ids)
        np.testing.assert_array_equal(
            np.sort(record.topk.dense()[0]), np.sort(other.topk.dense()[0][record.positions])
        )


def test_chats_store_what_the_assistant_says(tmp_path: Path, model_path: Path) -> None:
    """A share of the positions is one of the assistant's tokens; a chat without any is skipped."""
    texts = some_texts(12)
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "yes, " + text[:40]}]
        for text in texts[:8]
    ]
    chats += [chat[:1] for chat in chats[:2]]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    corpus = CorpusConfig(str(path), messages_column="messages", targets="assistant")
    config = replace(settings(tmp_path, model_path, path, max_length=1000), corpus=corpus)
    summary = dump.run(config)
    assert (summary["documents"], summary["skipped"]) == (8, 2)
    plan = Dump(config.output).plan
    assert (plan["targets"], plan["format_version"]) == ({"version": 1, "which": "assistant"}, 2)
    opened = open_corpus(config, ModelFolder(model_path))
    said = {each.doc_id: each for each in opened.sequences()}
    for record in LogitDataset(config.output):
        np.testing.assert_array_equal(record.positions, said[record.doc_id].positions)
        assert 5 < len(record.positions) < len(record.input_ids) - 5
    half = replace(config, positions=0.5, output=str(tmp_path / "half"))
    assert 0.3 < dump.run(half)["targets"] / summary["targets"] < 0.7
    assert Dump(half.output).plan["targets"] == {
        "version": 1, "which": "assistant", "positions": 0.5, "positions_seed": 0,
    }  # fmt: skip
    for record in LogitDataset(half.output):
        assert set(record.positions) <= set(said[record.doc_id].positions)


def test_auto_dtype_is_the_models_own(tmp_path: Path, corpus: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = tiny_model(tmp_path / f"model-{name}", dtype=dtype)
        config = settings(tmp_path, model, corpus, output=str(tmp_path / name))
        dump.run(config, only="plan")
        assert Dump(config.output).plan["teacher"]["dtype"] == name


def test_plan_stores_the_tokenizer(tmp_path: Path, model_path: Path, corpus: Path) -> None:
    summary = dump.run(settings(tmp_path, model_path, corpus, partitions=3), only="plan")
    assert summary == {"partitions": 3, "documents": 30}
    carried = tmp_path / "dump" / "tokenizer" / "tokenizer.json"
    assert carried.read_bytes() == (model_path / "tokenizer.json").read_bytes()
    with pytest.raises(IncompleteDump, match="3 of 3 partitions"):
        dump.run(settings(tmp_path, model_path, corpus, partitions=3), only="finalize")


def test_four_partitions_hold_the_same_rows_as_one(
    tmp_path: Path, model_path: Path, corpus: Path
) -> None:
    dump.run(settings(tmp_path, model_path, corpus))
    for index in [2, 0, 3]:
        config = settings(tmp_path, model_path, corpus, output=str(tmp_path / "four"), partitions=4)
        assert not dump.run(config, partition=index)["finished"]
    assert dump.run(config, partition=1)["finished"]
    assert rows(tmp_path / "four") == rows(tmp_path / "dump")


def test_a_finished_dump_starts_no_engine(
    tmp_path: Path, model_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, model_path, corpus)
    first = dump.run(config)
    monkeypatch.setattr(dump, "make_teacher", None)
    again = dump.run(config)
    assert again["rows"] == first["rows"]


def test_an_exception_keeps_what_is_committed(
    tmp_path: Path, model_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher fails in mid-shard. After the next run the dump equals an undisturbed one."""
    dump.run(settings(tmp_path, model_path, corpus))
    config = settings(tmp_path, model_path, corpus, output=str(tmp_path / "torn"))
    make = dump.make_teacher

    def failing(*arguments):  # type: ignore[no-untyped-def]
        teacher = make(*arguments)
        answer = teacher.topk

        def topk(sequences):  # type: ignore[no-untyped-def]
            for number, pair in enumerate(answer(sequences)):
                if number == 20:
                    raise RuntimeError("the engine died")
                yield pair

        teacher.topk = topk  # type: ignore[method-assign]
        return teacher

    monkeypatch.setattr(dump, "make_teacher", failing)
    with pytest.raises(RuntimeError, match="the engine died"):
        dump.run(config)
    committed = len(LogitDataset(config.output, partial=True))
    assert 0 < committed < 20
    assert not list(Path(config.output).rglob(".writing-*"))
    monkeypatch.setattr(dump, "make_teacher", make)
    dump.run(config)
    assert rows(config.output) == rows(tmp_path / "dump")


def test_a_shard_is_committed_while_the_next_one_fills(
    tmp_path: Path, model_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filling = threading.Event()
    write, commit = ShardWriter.write, ShardWriter.commit

    def noticed(writer: ShardWriter, record: Record) -> None:
        if writer.index == 1:
            filling.set()
        write(writer, record)

    def waiting(writer: ShardWriter, *arguments: object) -> object:
        assert writer.index or filling.wait(60), "nothing was written beside the commit"
        return commit(writer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWriter, "write", noticed)
    monkeypatch.setattr(ShardWriter, "commit", waiting)
    summary = dump.run(settings(tmp_path, model_path, corpus))
    assert summary["finished"]
    assert summary["shards"] > 1
    assert verify(tmp_path / "dump").ok


def test_a_commit_that_fails_ends_the_dump(
    tmp_path: Path, model_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in its thread while the next shard is open. Committed shards stay; none follows."""
    commit = ShardWriter.commit

    def failing(writer: ShardWriter, *arguments: object) -> object:
        if writer.index == 1:
            raise OSError("no luck")
        return commit(writer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWriter, "commit", failing)
    with pytest.raises(OSError, match="no luck"):
        dump.run(settings(tmp_path, model_path, corpus))
    assert len(Dump(tmp_path / "dump").shards()) == 1
    monkeypatch.undo()
    assert dump.run(settings(tmp_path, model_path, corpus))["finished"]
    assert verify(tmp_path / "dump").ok


@pytest.mark.slow
def test_a_killed_and_an_interrupted_script_resume(
    tmp_path: Path, model_path: Path, corpus: Path
) -> None:
    """SIGKILL and SIGTERM in mid-run of the real script leave the rows the same."""
    write_texts(corpus, some_texts(160))
    dump.run(settings(tmp_path, model_path, corpus))
    command = [
        *["dump_logits.py", "--model", model_path, "--corpus.path", corpus],
        *["--output", tmp_path / "killed", "--k=8", "--max_length=100", "--shard_tokens=500"],
        *["--engine=transformers", "--summary", tmp_path / "summary.json"],
    ]
    for number, code in [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)]:
        before = len(list((tmp_path / "killed").glob("00000/*.json")))
        process = scripts.Script(*command)
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed").glob("00000/*.json"))) < before + 3:
            assert time.monotonic() < deadline, "no shard was committed"
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(60) == code
    assert not (tmp_path / "summary.json").exists()
    assert scripts.run(*command).returncode == 0
    assert json.loads((tmp_path / "summary.json").read_text())["finished"]
    assert verify(tmp_path / "killed").ok
    assert rows(tmp_path / "killed") == rows(tmp_path / "dump")


def test_a_lost_marker_is_written_again(tmp_path: Path, model_path: Path, corpus: Path) -> None:
    """The last marker alone does not tell that one before it is gone."""
    config = settings(tmp_path, model_path, corpus)
    dump.run(config)
    before, path = rows(tmp_path / "dump"), tmp_path / "dump"
    shards = Dump(path).shards()
    assert len(shards) > 2
    for file in (path / "manifest.json", path / "00000/complete.json", *path.glob("rows-*")):
        file.unlink()
    (path / f"{shards[1].name}.json").unlink()
    dump.run(config)
    assert rows(path) == before
    assert len(Dump(path).shards()) == len(shards)


def test_another_plan_is_refused_and_the_difference_named(
    tmp_path: Path, model_path: Path, corpus: Path
) -> None:
    dump.run(settings(tmp_path, model_path, corpus), only="plan")
    with pytest.raises(PlanMismatch, match="k: 8 in the dump, 4 asked for"):
        dump.run(settings(tmp_path, model_path, corpus, k=4))
    write_texts(corpus, some_texts(31))
    with pytest.raises(PlanMismatch, match=r"corpus\.documents: 30 in the dump, 31 asked for"):
        dump.run(settings(tmp_path, model_path, corpus))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_from_the_teacher_names_the_document(
    tmp_path: Path, corpus: Path, value: float
) -> None:
    model = tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][5] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidRecord, match="document '0', chunk 0"):
        dump.run(settings(tmp_path, model, corpus))
    assert len(LogitDataset(tmp_path / "dump", partial=True)) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 513}, "vocabulary has only 512"),
        ({"max_length": 4096}, "reads at most 2048"),
        ({"model": "./no/such/model"}, "no such directory"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, model_path: Path, corpus: Path, changes: dict, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        dump.run(settings(tmp_path, model_path, corpus, **changes))
    assert not (tmp_path / "dump").exists()


def test_a_model_without_tokenizer_or_config_is_refused(tmp_path: Path, corpus: Path) -> None:
    model = tiny_model(tmp_path / "model")
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        (model / name).unlink()
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no tokenizer"):
        dump.run(settings(tmp_path, model, corpus))
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        dump.run(settings(tmp_path, model, corpus))


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_model_that_lacks_weights_makes_no_plan(
    tmp_path: Path, corpus: Path, engine: str
) -> None:
    """A plan would hold the fingerprint of the incomplete weights, and refuse the whole ones."""
    model = tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    config = settings(tmp_path / "dump", model, corpus, engine=engine)
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.input_layernorm"):
        dump.run(config)
    assert not (tmp_path / "dump").exists()


def test_a_corpus_of_empty_documents_is_refused(tmp_path: Path, model_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus.jsonl", ["", ""])
    with pytest.raises(ConfigError, match="no document has two tokens or more, so"):
        dump.run(settings(tmp_path, model_path, corpus))


def test_a_corpus_without_a_target_is_refused(tmp_path: Path, model_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus.jsonl", some_texts(2))
    with pytest.raises(ConfigError, match="two tokens or more and a target behind the first"):
        dump.run(settings(tmp_path, model_path, corpus, positions=1e-9))


def test_exit_codes(tmp_path: Path, model_path: Path, corpus: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    good = settings(tmp_path, model_path, corpus)
    assert cli.main(lambda: dump.run(good, only="plan"), None) == 0
    assert cli.main(lambda: dump.run(good, only="finalize"), None) == 2
    other = settings(tmp_path, model_path, corpus, k=4)
    assert cli.main(lambda: dump.run(other), None) == 3
    assert "k: 8 in the dump" in capsys.readouterr().err


def test_script_refuses_a_partition_out_of_range() -> None:
    words = ["--model=m", "--corpus.path=c", "--output=o", "--partition", "4/4"]
    result = scripts.run("dump_logits.py", *words)
    assert result.returncode == 2
    assert "0 <= I < N" in result.stderr
