"""Stage one on an object store: a real S3 server, a store that fails, and training from it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import cli
from pipeline.config import CorpusConfig
from pipeline.dump import dump
from pipeline.dump.partitions import PartitionsWriter, what_is_missing
from pipeline.dump.plan import plan_there
from pipeline.errors import ConfigError
from storage import CorruptShard, Dump, LogitDataset, StoreError, create_dump, verify
from storage.__main__ import main as storage_main
from storage.gc import leftovers
from storage.index_files import dump_index
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import rows, settings
from tests.helpers.s3 import FAULTS, FaultyProxy, MotoServer, environment

BUCKET = "bucket"


@pytest.fixture(scope="module")
def server() -> Iterator[MotoServer]:
    with MotoServer() as started:
        started.client().create_bucket(Bucket=BUCKET)
        yield started


@pytest.fixture
def client(server: MotoServer) -> Any:
    """A client of the server itself, without the proxy. The bucket is empty at the start."""
    client = server.client()
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    return client


@pytest.fixture(autouse=True)
def settings_for_s3(monkeypatch: pytest.MonkeyPatch, server: MotoServer) -> Iterator[None]:
    use(server.port, monkeypatch)
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def use(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(port).items():
        monkeypatch.setenv(name, value)
    # Short timeouts and no retries in botocore: the tests check this package's own retries.
    impatient = {"read_timeout": 1, "connect_timeout": 2, "retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": impatient})
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "corpus.jsonl", some_texts(30))


def keys(client: Any) -> set[str]:
    found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {entry["Key"] for entry in found}


@pytest.mark.parametrize("codec", ["v1", "v3"])
def test_dump_resume_verify_and_gc_on_s3(
    tmp_path: Path, model_path: Path, corpus: Path, client: Any, capsys: Any, codec: str
) -> None:
    """The real script is killed; the dump is resumed, verified, and equal to a local one."""
    dump.run(settings(tmp_path, model_path, corpus, codec=codec))
    client.upload_file(str(corpus), BUCKET, "texts/corpus.jsonl")
    output = f"s3://{BUCKET}/dump"
    words = [f"--model={model_path}", f"--output={output}", "--k=8", "--engine=transformers"]
    words += [f"--corpus.path={corpus}", "--max_length=100", "--shard_tokens=500"]
    words.append(f"--codec={codec}")
    process = scripts.Script("dump_logits.py", *words)
    deadline = time.monotonic() + 120
    while "dump/00000/00001.json" not in keys(client):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {key for key in keys(client) if key.endswith(".json")}
    assert "dump/manifest.json" not in before
    # A writer that dies between its data file and its marker leaves such a file.
    client.put_object(Bucket=BUCKET, Key="dump/00000/00003-feedbeef0123.parquet", Body=b"half")
    dump.run(settings(tmp_path, model_path, corpus, output=output, codec=codec))
    assert before <= keys(client)
    assert any("/tables-" in key for key in keys(client)) == (codec == "v3")
    assert rows(output) == rows(tmp_path / "dump")
    report = verify(output)
    assert report.ok
    assert any("feedbeef" in note for note in report.notes)
    assert storage_main(["gc", output, "--older-than=-1"]) == 0
    assert "00003-feedbeef0123" in capsys.readouterr().out
    assert storage_main(["gc", output, "--older-than=-1", "--delete"]) == 0
    assert not verify(output).notes
    assert rows(output) == rows(tmp_path / "dump")
    assert not list(LogitDataset(output).dump.store.remote_staging.glob("*"))


def test_the_corpus_may_be_on_s3(tmp_path: Path, model_path: Path, client: Any) -> None:
    for part in range(2):
        path = write_texts(tmp_path / f"{part}.jsonl", some_texts(20)[10 * part : 10 * part + 10])
        client.upload_file(str(path), BUCKET, f"texts/{part}.jsonl")
    whole = write_texts(tmp_path / "whole.jsonl", some_texts(20))
    dump.run(settings(tmp_path, model_path, whole))
    for path in [f"s3://{BUCKET}/texts", f"s3://{BUCKET}/texts/*.jsonl"]:
        output = str(tmp_path / f"dump-{len(path)}")
        config = settings(tmp_path, model_path, whole, output=output)
        config.corpus = CorpusConfig(path)
        dump.run(config)
        assert rows(output) == rows(tmp_path / "dump")
    config.corpus = CorpusConfig(f"s3://{BUCKET}/none")
    with pytest.raises(ConfigError, match="no such file"):
        dump.run(config)


@pytest.mark.slow
def test_a_store_that_fails_for_a_time_costs_only_time(
    tmp_path: Path,
    model_path: Path,
    corpus: Path,
    client: Any,
    server: MotoServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tenth of all requests fails or is slow, also after the server has done its work. Meanwhile
    a reader sees whole shards only."""
    dump.run(settings(tmp_path, model_path, corpus))
    output = f"s3://{BUCKET}/dump"
    with FaultyProxy(server.port, rate=0.1, seed=1, stall=1.3) as proxy:
        use(proxy.port, monkeypatch)
        monkeypatch.setattr("storage.store.FIRST_PAUSE", 0.02)
        seen, stop = [], threading.Event()
        watcher = threading.Thread(target=watch, args=(client, seen, stop))
        watcher.start()
        dump.run(settings(tmp_path, model_path, corpus, output=output))
        stop.set()
        watcher.join()
        assert rows(output) == rows(tmp_path / "dump")
        report = verify(output)
        assert report.ok, report.faults
        assert set(proxy.happened) == set(FAULTS), proxy.happened
    assert len(seen) > 3
    assert all(data is not None for _, data in seen), "a marker named a file that was not there"
    named = {f"dump/{shard.file}" for shard in LogitDataset(output).shards}
    assert named <= keys(client)


def watch(client: Any, seen: list[Any], stop: threading.Event) -> None:
    """For each marker, as soon as it appears, record whether its data file is whole."""
    import hashlib
    import json

    known: set[str] = set()
    while not stop.is_set():
        for key in sorted(keys(client) - known):
            known.add(key)
            if key.startswith("dump/00000/0") and key.endswith(".json"):
                marker = json.loads(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
                data = client.get_object(Bucket=BUCKET, Key=f"dump/00000/{marker['file']}")
                whole = hashlib.sha256(data["Body"].read()).hexdigest() == marker["sha256"]
                seen.append((key, True if whole else None))
        time.sleep(0.01)


def test_a_store_that_does_not_answer_fails_the_dump_which_then_resumes(
    tmp_path: Path,
    model_path: Path,
    corpus: Path,
    client: Any,
    server: MotoServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dump.run(settings(tmp_path, model_path, corpus))
    config = settings(tmp_path, model_path, corpus, output=f"s3://{BUCKET}/dump")
    monkeypatch.setattr("storage.store.PATIENCE", 2.0)
    commit = PartitionsWriter.commit
    with FaultyProxy(server.port, rate=0) as proxy:
        use(proxy.port, monkeypatch)

        def then_down(writer: PartitionsWriter) -> None:
            commit(writer)
            writer.settle()
            proxy.down = writer.index >= 3

        monkeypatch.setattr(PartitionsWriter, "commit", then_down)
        assert cli.main(lambda: dump.run(config), None) == 1
        message = capsys.readouterr().err
        assert "the store did not answer for 2 s" in message
        assert "run the same command again" in message
        with pytest.raises(StoreError):
            LogitDataset(config.output, partial=True)
        proxy.down = False
        monkeypatch.setattr(PartitionsWriter, "commit", commit)
        assert verify(config.output, partial=True).ok
        assert len(LogitDataset(config.output, partial=True).shards) == 3
        dump.run(config)
    assert rows(config.output) == rows(tmp_path / "dump")


def test_readers_keep_a_local_copy(
    tmp_path: Path,
    model_path: Path,
    corpus: Path,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = f"s3://{BUCKET}/dump"
    dump.run(settings(tmp_path, model_path, corpus, output=output))
    expected = rows(output)
    shards = LogitDataset(output).shards
    sizes = [shard.marker["bytes"] for shard in shards]
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "cache"))
    assert rows(output) == expected
    kept = sorted(path.name for path in (tmp_path / "cache").glob("*.parquet"))
    assert kept == sorted(f"{shard.marker['sha256']}.parquet" for shard in shards)
    for shard in shards:  # from now on, rows must come from the copies
        client.delete_object(Bucket=BUCKET, Key=f"dump/{shard.file}")
    assert rows(output) == expected
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "other"))
    with pytest.raises(CorruptShard, match="missing"):
        rows(output)
    client.put_object(Bucket=BUCKET, Key=f"dump/{shards[0].file}", Body=b"x" * sizes[0])
    with pytest.raises(CorruptShard, match="changed after commit"):
        rows(output)
    assert not list((tmp_path / "other").glob("*.parquet"))


def test_a_row_is_one_request(
    tmp_path: Path, model_path: Path, corpus: Path, client: Any, server: MotoServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """At the start plan, manifest and index, for which s3fs asks twice; each set of tables once;
    then a GET a row."""
    output = f"s3://{BUCKET}/dump"
    dump.run(settings(tmp_path, model_path, corpus, output=output))
    expected = [record.doc_id for record in LogitDataset(output)]
    with FaultyProxy(server.port, rate=0) as proxy:
        use(proxy.port, monkeypatch)
        dataset = LogitDataset(output)
        assert len(dataset.lengths) == len(expected)
        assert proxy.requests <= 4
        before, order = proxy.requests, list(range(len(dataset)))[::-1]
        assert [dataset[number].doc_id for number in order] == expected[::-1]
        tables = {shard.tables for shard in dataset.shards}
        assert proxy.requests - before == len(dataset) + len(tables)
        proxy.rate, proxy.stall = 0.3, 1.3
        monkeypatch.setattr("storage.store.FIRST_PAUSE", 0.02)
        found = LogitDataset(output).read(order)
        assert [record.doc_id for record in found] == expected[::-1], "requested together"
        assert sum(proxy.happened.values()) > 3


def test_a_marker_is_one_request(
    tmp_path: Path, model_path: Path, corpus: Path, client: Any, server: MotoServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """To finish a dump, to resume it and to look for leftovers, besides a few for the dump."""
    output = f"s3://{BUCKET}/dump"
    changes = {"output": output, "partitions": 2, "shard_tokens": 100}
    config = settings(tmp_path, model_path, corpus, **changes)
    dump.run(config)
    finished = Dump(output).manifest()
    shards, manifest = len(finished.shards), Dump(output).manifest_bytes()
    assert shards > 20
    for key in ("manifest.json", dump_index(finished.fingerprint)):
        client.delete_object(Bucket=BUCKET, Key=f"dump/{key}")
    with FaultyProxy(server.port, rate=0) as proxy:
        use(proxy.port, monkeypatch)
        assert dump.run(config, only="finalize")["shards"] == shards
        assert proxy.requests <= shards + 20
        assert Dump(output).manifest_bytes() == manifest
        assert f"dump/{dump_index(finished.fingerprint)}" in keys(client)
        before = proxy.requests
        assert leftovers(output, hours=-1) == []
        assert proxy.requests - before <= shards + 3
        last = Dump(output).partition(1).latest()[0]
        for key in (f"{last.name}.json", "00001/complete.json", "00001/complete.index"):
            client.delete_object(Bucket=BUCKET, Key=f"dump/{key}")
        before, plan = proxy.requests, plan_there(output)
        assert plan is not None
        partition = create_dump(output, plan, {"tokenizer.json": b""}).partition(1)
        assert partition.summary is None
        assert what_is_missing(partition, 30).shard == last.index
        assert proxy.requests - before <= 20
        proxy.rate, proxy.stall = 0.1, 1.3
        monkeypatch.setattr("storage.store.FIRST_PAUSE", 0.02)
        assert len(Dump(output).shards()) == shards - 1
        assert sum(proxy.happened.values()) > 1


def test_the_cache_is_bounded(
    tmp_path: Path, model_path: Path, corpus: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"s3://{BUCKET}/dump"
    dump.run(settings(tmp_path, model_path, corpus, output=output))
    expected = rows(output)
    sizes = [shard.marker["bytes"] for shard in LogitDataset(output).shards]
    limit = 2.5 * max(sizes)
    assert sum(sizes) > limit
    monkeypatch.setenv("MOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOL_CACHE_GB", str(limit / 1e9))
    for _ in range(2):
        assert rows(output) == expected
        kept = (tmp_path / "cache").glob("*.parquet")
        assert sum(path.stat().st_size for path in kept) <= limit


def test_training_from_s3_equals_training_from_disk(
    tmp_path: Path, model_path: Path, corpus: Path, client: Any
) -> None:
    """Two steps, read in a forked worker process, have the same losses."""
    from pipeline.training import train
    from tests.helpers import runs

    dump.run(settings(tmp_path, model_path, corpus))
    for path in (tmp_path / "dump").rglob("*"):
        if path.is_file():
            key = f"copied/{path.relative_to(tmp_path / 'dump')}"
            client.upload_file(str(path), BUCKET, key)
    logged = {}
    for name, place in [("disk", str(tmp_path / "dump")), ("s3", f"s3://{BUCKET}/copied")]:
        config = runs.settings(
            tmp_path,
            model_path,
            Path("none"),
            corpus,
            output=str(tmp_path / name),
            training={"max_steps": 2, "dataloader_num_workers": 1},
        )
        config.dump = place
        train.run(config)
        logged[name] = runs.steps(tmp_path / name)
    assert len(logged["disk"]) == 2
    assert logged["s3"] == logged["disk"]
