"""What a start of a run costs over 1 to 5,000 files, and an item over 10 k to 50 M sequences.

    PYTHONPATH=. python scripts/benchmarks/bench_corpora.py starts
    PYTHONPATH=. python scripts/benchmarks/bench_corpora.py items

`starts` writes corpora of JSONL, each document a sequence of some 20 tokens, and opens each one
twice, in processes of their own, as training does: its fingerprint, what shows how it is rendered,
and its token sequences.

    documents  that the tokenizer read
    opened     times that the documents' Arrow file was opened
    MB read    of files, by the kernel's count
    s          CPU time, without what importing takes
    MB         of memory more than before

`items` makes stores of random ids, which is one part that is linked until there are so many
sequences, and opens each one in a process of its own.

    ms         to open it
    MB         of memory more than before, when it is open
    order      us of CPU time to find which sequence an item is, over 20,000 items
    us         CPU time of the items of the mixed stream, with their tokens
    again      the same items once more, when their pages are mapped
    touched    MB of memory more, after these items: pages of the files, which all ranks share

Times are of one core, whatever else the machine does; compare them within one run.
"""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.data.mixing import MixedDataset
from pipeline.data.orders import place
from pipeline.token_sequences import TokenSequences
from tests.helpers.models import TEXTS, tiny_tokenizer

PAGE = os.sysconf("SC_PAGE_SIZE")
LENGTH = 20  # tokens of a sequence of `items`
ITEMS = 20_000


@dataclass
class Start:
    """What one start cost; see the module."""

    documents: int
    opened: int
    read: float
    s: float
    memory: float


def resident() -> float:
    """MB of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def bytes_read() -> int:
    """By this process, from files or from what the kernel keeps of them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def write_corpus(folder: Path, files: int, documents: int) -> Path:
    """Short documents of real words, all different, in `files` files."""
    words = " ".join(TEXTS[:40]).split()
    folder.mkdir(parents=True)
    for number in range(files):
        with open(folder / f"{number:05}.jsonl", "w", encoding="utf-8") as out:
            for at in range(number, documents, files):
                text = " ".join(words[at * 7 % 5000 :][:8])
                out.write(json.dumps({"text": f"{at} {text}"}) + "\n")
    return folder


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Documents that go to a tokenizer, and Arrow files of documents that are opened, meanwhile."""
    found = {"documents": 0, "opened": 0}
    call, from_file = PreTrainedTokenizerFast.__call__, datasets.Dataset.from_file

    def tokenized(self: Any, texts: Any, *given: Any, **named: Any) -> Any:
        found["documents"] += len(texts) if isinstance(texts, list) else 0
        return call(self, texts, *given, **named)

    def opened(*given: Any, **named: Any) -> Any:
        found["opened"] += 1
        return from_file(*given, **named)

    PreTrainedTokenizerFast.__call__ = tokenized
    datasets.Dataset.from_file = opened
    try:
        yield found
    finally:
        PreTrainedTokenizerFast.__call__ = call
        datasets.Dataset.from_file = from_file


def start(path: Path, tokenizer: Any) -> tuple[Start, TokenSequences]:
    """Open a corpus as a run does."""
    memory, read, began = resident(), bytes_read(), time.process_time()
    with counted() as found:
        corpus = Corpus(CorpusConfig(str(path)), tokenizer, 2048)
        corpus.fingerprint(), corpus.rendering()
        sequences = TokenSequences(corpus)
        len(sequences)
    seconds = time.process_time() - began
    used = found["documents"], found["opened"], (bytes_read() - read) / 1e6
    return Start(*used, seconds, resident() - memory), sequences


def starts(given: argparse.Namespace) -> None:
    print("  files   sequences  start   documents  opened  MB read        s       MB")
    with tempfile.TemporaryDirectory() as name:
        tiny_tokenizer(Path(name) / "tokenizer")
        for files, documents in given.corpora:
            path = write_corpus(Path(name) / f"{files}-{documents}", files, documents)
            for which in ("first", "second"):
                found = Start(**apart("start", path, Path(name)))
                print(
                    f"{files:>7,}{documents:>12,}  {which:<7}{found.documents:>10,}"
                    f"{found.opened:>8}{found.read:>9.1f}{found.s:>9.2f}{found.memory:>9.1f}"
                )


def apart(what: str, *words: Path) -> dict[str, float]:
    """Run `start` or `item` in a process of its own, with a cache in the last folder."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(words[-1] / "cache")}
    command = [sys.executable, __file__, what, *map(str, words)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def write_store(folder: Path, sequences: int, parts: int) -> Path:
    """A store of random ids below 65,536 in `parts` links to one part."""
    from pipeline.token_store import Row, finish, schema_of, sums_of, write_part

    folder.mkdir(parents=True)
    rng, schema, first = np.random.default_rng(0), schema_of(1 << 16, False), folder / "0.arrow"
    size = sequences // parts

    def rows() -> Iterator[Row]:
        for at in range(0, size, 10_000):
            ids = rng.integers(0, 1 << 16, (min(10_000, size - at), LENGTH), np.int32)
            yield from (Row.of(at + n, 0, each, None, False) for n, each in enumerate(ids))

    write_part(first, rows(), schema)
    found = sums_of(first, schema)
    assert found is not None
    names = [f"{number}.arrow" for number in range(parts)]
    for name in names[1:]:
        os.link(first, folder / name)
    sums = [type(found)(**{**asdict(found), "name": name}) for name in names]
    finish(folder, sums, {}, {"documents": sequences, "rendering": {}})
    return folder


def item(folder: Path) -> dict[str, float]:
    from pipeline.token_store import find_store

    memory, began = resident(), time.perf_counter()
    store = find_store(folder)
    assert store is not None
    text = TokenSequences.__new__(TokenSequences)
    text.store, text.chosen = store, None
    found = {"sequences": len(text), "tokens": text.token_count}
    found |= {"ms": 1e3 * (time.perf_counter() - began), "memory": resident() - memory}
    mixed = MixedDataset(text, None, 0.0, 0, 8)
    mixed[0]
    memory = resident()
    found["order"] = microseconds(lambda at: place(len(text), at, 0, 0, 0))
    found["us"], found["again"] = (microseconds(mixed.__getitem__) for _ in range(2))
    return found | {"touched": resident() - memory}


def microseconds(work: Callable[[int], object]) -> float:
    """CPU time of the work for an item, over ITEMS items."""
    began = time.process_time()
    for at in range(ITEMS):
        work(at)
    return 1e6 * (time.process_time() - began) / ITEMS


def items(given: argparse.Namespace) -> None:
    print("    sequences          tokens  parts       ms      MB   order      us   again  touched")
    with tempfile.TemporaryDirectory() as name:
        for sequences, parts in given.stores:
            folder = write_store(Path(name) / f"{sequences}", sequences, parts)
            found = apart("item", folder)
            print(
                f"{found['sequences']:>13,}{found['tokens']:>16,}{parts:>7}{found['ms']:>9.2f}"
                f"{found['memory']:>8.1f}{found['order']:>8.2f}{found['us']:>8.2f}{found['again']:>8.2f}"
                f"{found['touched']:>9.1f}"
            )


def pair(text: str) -> tuple[int, int]:
    one, other = map(int, text.split(":"))
    return one, other


def main() -> None:
    if sys.argv[1:2] == ["start"]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(sys.argv[3]) / "tokenizer")
        print(json.dumps(asdict(start(Path(sys.argv[2]), tokenizer)[0])))
        return
    if sys.argv[1:2] == ["item"]:
        print(json.dumps(item(Path(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["starts", "items"])
    corpora = [(1, 10_000), (1, 100_000), (500, 100_000), (5000, 100_000)]
    parser.add_argument("--corpora", type=pair, nargs="+", default=corpora, help="files:documents")
    stores = [(10_000, 1), (1_000_000, 2), (10_000_000, 16), (50_000_000, 80)]
    parser.add_argument("--stores", type=pair, nargs="+", default=stores, help="sequences:parts")
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    (starts if given.what == "starts" else items)(given)


if __name__ == "__main__":
    main()
