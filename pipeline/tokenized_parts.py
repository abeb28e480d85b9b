"""Tokenize a corpus into a store (token_store.py), part by part.

Several processes work on one store: ranks of a run, other runs, and helpers that a process starts.
Each takes a part that nobody works on. The part of a process that died is taken by another one, so
a build that was killed goes on where it stopped.
"""

import contextlib
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.corpus import Corpus
from pipeline.errors import ConfigError, FailedError
from pipeline.progress import REPORT_TO, Progress
from pipeline.signals import die_with_parent
from pipeline.token_store import (
    LOCKS,
    PartSums,
    Row,
    TokenStore,
    drafts_of,
    find_store,
    finish,
    schema_of,
    sums_of,
    write_part,
)

PART_BYTES = 32 << 20
"""Text of a part: seconds of work, and a thousand parts for 32 GB."""
HELPED = 4
"""Missing parts from which on helpers are started, which takes each of them seconds."""
ONE_BUILD = threading.Lock()  # the kernel's locks are a process's, not a thread's


@dataclass(frozen=True)
class Span:
    """The documents of a part, and its file."""

    path: Path
    start: int
    stop: int


def stored(corpus: Corpus) -> TokenStore:
    """The store of a corpus's token sequences; makes it where it is not there.

    Raises ConfigError for a document that cannot be tokenized, and FailedError where the cache
    cannot be written.
    """
    if corpus.store is None:
        folder = corpus.store_folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ONE_BUILD, helpers(corpus):
                corpus.store = Build(corpus).run()
        except OSError as error:
            raise FailedError(
                f"token cache {folder}: {error}. Make room there, or set HF_DATASETS_CACHE"
            ) from error
    return corpus.store


def spans_of(corpus: Corpus) -> list[Span]:
    """The parts of a corpus: the same ones in every process."""
    documents = len(corpus)
    size = max(1, documents * PART_BYTES // max(corpus.documents.data.nbytes, 1))
    ends = [(at, min(at + size, documents)) for at in range(0, documents, size)]
    return [Span(corpus.store_folder / f"{at}-{end}.arrow", at, end) for at, end in ends]


class Build:
    """What one process does for a store."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.folder, self.spans = corpus, corpus.store_folder, spans_of(corpus)
        self.schema = schema_of(corpus.vocabulary, corpus.masked)
        self.progress: Progress | None = None

    def run(self) -> TokenStore:
        """Write the parts that are missing, and store.json unless another process did."""
        with Locks(self.folder / LOCKS) as locks, self.shown():
            for wait in (False, True):  # what nobody works on, then what others did not finish
                for number, span in enumerate(self.spans):
                    if not span.path.exists():
                        with locks.taken(number, wait) as mine:
                            if mine and not span.path.exists():
                                self.write(span, locks.are_kept)
            with locks.taken(len(self.spans), wait=True):
                return find_store(self.folder) or self.finish()

    def write(self, span: Span, alone: bool) -> None:
        """Write a part. `alone`: nobody else does."""
        for draft in drafts_of(span.path) if alone else ():
            draft.unlink(missing_ok=True)  # of a process that was killed
        write_part(span.path, self.counted(span), self.schema)

    def finish(self) -> TokenStore:
        corpus = self.corpus
        facts = {"documents": len(corpus), "rendering": corpus.rendering()}
        facts["path"] = corpus.config.path  # for people
        parts = [self.checked(span) for span in self.spans]
        return finish(self.folder, parts, corpus.identity(), facts)

    def checked(self, span: Span) -> PartSums:
        """What a part holds; a damaged one is written anew."""
        found = sums_of(span.path, self.schema)
        if found is None:
            self.write(span, alone=False)
            found = sums_of(span.path, self.schema)
        assert found is not None
        return found

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Progress, by the first rank. A process whose progress another one shows has its own."""
        if os.environ.get("RANK", "0") != "0" or REPORT_TO in os.environ:
            yield
            return
        self.progress = Progress(len(self.corpus), "document")
        self.progress.status = f"tokenizing {self.corpus.config.path}"
        try:
            yield
        finally:
            self.progress.close()

    def counted(self, span: Span) -> Iterable[Row]:
        """The rows of a part, counted for the progress."""
        rows = self.corpus.rows(span.start, span.stop)
        if self.progress is None:
            return rows
        there = {path.name for path in self.folder.glob("*.arrow")}
        done = sum(each.stop - each.start for each in self.spans if each.path.name in there)
        return self.counting(rows, self.progress, done - span.start)

    @staticmethod
    def counting(rows: Iterator[Row], progress: Progress, done: int) -> Iterator[Row]:
        for row in rows:
            progress.update(done + row.document, lambda: progress.status)
            yield row


class Locks:
    """A lock of the kernel for each number, on one file. They end with the process.

    On a file system without locks, processes do the same work, each rightly.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.are_kept = path, True

    def __enter__(self) -> "Locks":
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    @contextlib.contextmanager
    def taken(self, number: int, wait: bool) -> Iterator[bool]:
        """Whether the lock is this process's, until the end of the block."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            yield False
            return
        except OSError:
            self.are_kept = False
        try:
            yield True
        finally:
            if self.are_kept:
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number)


@contextlib.contextmanager
def helpers(corpus: Corpus) -> Iterator[None]:
    """Processes that work on the same store meanwhile, one for each core that is left."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun on this machine
    missing = sum(not span.path.exists() for span in spans_of(corpus))
    cores = len(os.sched_getaffinity(0)) // ranks
    number = min(cores, missing) - 1 if missing >= HELPED else 0
    started = [start_helper(corpus) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def start_helper(corpus: Corpus) -> "subprocess.Popen[bytes]":
    own = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    given = {name: value for name, value in os.environ.items() if name != REPORT_TO}
    with tempfile.TemporaryFile() as file:
        pickle.dump(corpus, file)
        file.seek(0)
        command = [sys.executable, "-P", "-m", __name__]
        return subprocess.Popen(command, stdin=file, env={**given, **own, "RANK": "1"})


def main() -> None:
    """A helper: works on the store of the corpus that its parent wrote to stdin."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    with contextlib.suppress(ConfigError, OSError):  # the parent meets it, too
        Build(pickle.load(sys.stdin.buffer)).run()


if __name__ == "__main__":
    main()
