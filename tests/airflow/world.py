"""Run by the project's interpreter, for tests that run in Airflow's environment.

python -m tests.airflow.world make FOLDER   make a tiny model, corpora, configs and a dump
python -m tests.airflow.world rows DUMP     print all rows as JSON; fails on a damaged dump
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

from storage import verify
from tests.helpers.corpora import write_texts
from tests.helpers.dumps import rows as contents
from tests.helpers.models import TEXTS, tiny_model

DOCUMENTS = 600
DUMP = """
model: model
output: reference
corpus: {path: general.jsonl}
k: 8
max_length: 100
engine: transformers
shard_tokens: 1000
"""
TRAIN = """
model: model
output: student
dump: reference
domain: {path: domain.jsonl}
training: {max_steps: 4, per_device_train_batch_size: 2, report_to: none, use_cpu: true}
"""
EVALUATE = """
models: {base: model}
domain: {path: held-out.jsonl, limit: 5}
general: {path: held-out.jsonl, skip: 5}
max_length: 100
"""


def make(folder: Path) -> None:
    """Make everything in `folder`, where relative paths in the configs start."""
    from pipeline import cli
    from pipeline.config import CorpusConfig, DumpConfig
    from pipeline.dump import dump

    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(folder / "model")
    general = write_texts(
        folder / "general.jsonl",
        [f"{i} {TEXTS[i % len(TEXTS)][: 40 + 97 * (i % 11)]}" for i in range(DOCUMENTS)],
    )
    write_texts(folder / "domain.jsonl", [text[-900:] for text in TEXTS[:30]])
    write_texts(folder / "held-out.jsonl", [text[900:1500] for text in TEXTS[30:45]])
    for name, text in [("dump", DUMP), ("train", TRAIN), ("evaluate", EVALUATE)]:
        (folder / f"{name}.yaml").write_text(text)
    config = DumpConfig(
        model=str(folder / "model"),
        corpus=CorpusConfig(str(general)),
        output=str(folder / "reference"),
        k=8,
        max_length=100,
        engine="transformers",
        shard_tokens=1000,
    )
    sys.exit(cli.main(lambda: dump.run(config), None))


def rows(dump: str) -> None:
    """Print {"document/chunk": sha256 of its tokens and distributions}."""
    report = verify(dump)
    if not report.ok:
        sys.exit("\n".join(report.faults))
    found = contents(dump).items()
    print(json.dumps({f"{doc}/{chunk}": sha256(row).hexdigest() for (doc, chunk), row in found}))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        rows(sys.argv[2])
