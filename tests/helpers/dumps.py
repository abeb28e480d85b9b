"""Stage one for the tests: settings, the real script, the rows of a finished dump."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import CorpusConfig, DumpConfig
from pipeline.dump import dump
from storage import LogitDataset, ShardWriter, create_dump
from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "dump_logits.py"
OPENING = 2
"""Requests to a dump for which a partition learns what to read: the plan, the corpus's files."""


def settings(tmp_path: Path, model_path: Path, corpus: Path, **changes: object) -> DumpConfig:
    given = {
        "model": str(model_path),
        "corpus": CorpusConfig(str(corpus)),
        "output": str(tmp_path / "dump"),
        "k": 8,
        "max_length": 100,
        "engine": "transformers",
        "shard_tokens": 500,
        **changes,
    }
    return DumpConfig(**given)  # type: ignore[arg-type]


def rows(path: Path | str) -> dict[tuple[str, int], bytes]:
    """The content of every row, by document and chunk.

    Version 3 orders equally likely ids as its tables do; here they come by ascending id.
    """
    found = {}
    dataset = LogitDataset(path)
    for record in dataset:
        topk = record.topk
        ids, at, entries = record.input_ids, record.positions, [topk.ids, topk.logprobs]
        if dataset.plan.get("codec") == "v3":
            place = np.repeat(np.arange(len(topk)), topk.counts)
            order = np.lexsort((topk.ids, -topk.logprobs, place))
            entries = [part[order] for part in entries]
        parts = [ids, at, topk.counts, *entries, topk.tail_logprob]
        key = (record.doc_id, record.chunk)
        assert key not in found
        found[key] = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return found


def with_rows(source: Path, target: Path, change: Any, **more: Any) -> Path:
    """Write a finished dump of the rows that `change` returns; `more` changes the plan."""
    old = LogitDataset(source)
    plan = {name: value for name, value in old.plan.items() if name != "format_version"}
    dump = create_dump(target, {**plan, **more})
    writer = ShardWriter(dump.partition(0), 0)
    for record in old:
        writer.write(change(record))
    writer.commit(cursor={"document": 0}, stats={"documents": 0})
    dump.partition(0).finish({})
    dump.finish()
    return target


def dumped(model: Path, corpus: Path, output: Path, **changes: object) -> Path:
    """A dump by transformers of what the model says to the corpus."""
    dump.run(settings(output.parent, model, corpus, output=str(output), **changes))
    return output
