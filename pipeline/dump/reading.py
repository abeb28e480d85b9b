"""How much of the corpus a process reads: all of it, or the files of its partition.

A list in the dump tells which these are. Whoever has read the whole corpus writes it, and it is
trusted where it gives the fingerprint of the plan. Processes of one machine share its cache: where
that has all documents, none is made of a part.
"""

from pipeline.config import DumpConfig
from pipeline.corpus import Corpus
from pipeline.corpus_files import find_files, sizes_of
from pipeline.corpus_part import CorpusPart
from pipeline.dump.partitions import documents_of
from pipeline.dump.plan import open_corpus, share_of
from pipeline.listed_corpus import SHOWN, ListedCorpus, list_of
from pipeline.models.directory import ModelFolder
from pipeline.progress import say
from storage import Dump
from storage.corpus_list import MOST_BYTES, list_file, read_list
from storage.errors import CorruptShard, FormatVersionError, PlanMismatch


class Whole(Exception):
    """Why a process takes the whole corpus."""


def open_own(
    config: DumpConfig, model: ModelFolder, partition: int | None, there: Dump | None
) -> Corpus:
    """The corpus for one partition of the dump that is `there`, if one is; with None, for a process
    that writes no rows.

    Says how much is read. Raises what Corpus does, and PlanMismatch that names the files which are
    not those that the dump was planned from.
    """
    who = "finalize" if partition is None else f"partition {partition} of {config.partitions}"
    files = find_files(config.corpus.path, config.corpus.split)
    sizes = sizes_of(files) if files else []
    try:
        known = listed_corpus(config, model, files, there)
        if known.is_cached:
            raise Whole("this machine has its documents in the cache")
        check_files(known, files, sizes)
        first, stop = documents_of(partition or 0, config.partitions, len(known))
        which = known.holding(first, max(first + 1, stop if partition is not None else 0))
        if len(which) == len(files):
            raise Whole("its documents are in all of them")
    except Whole as reason:
        size = f", {in_words(sum_of(sizes))}" if files else ""
        say(f"{who}: takes the whole corpus{size}: {reason}")
        return open_corpus(config, model)
    own, every = in_words(sum_of(sizes[which.start : which.stop])), in_words(sum_of(sizes))
    say(f"{who}: reads {len(which):,} of {len(files):,} files of the corpus, {own} of {every}")
    return CorpusPart(known, files, which, config.max_length, config.add_eos, share_of(config))


def listed_corpus(
    config: DumpConfig, model: ModelFolder, files: list[str], there: Dump | None
) -> ListedCorpus:
    """The corpus as the dump lists it. Raises Whole where that does not do."""
    if len(files) < 2:
        raise Whole("it is a single file" if files else "it is a dataset of the hub")
    if config.corpus.reread:
        raise Whole("corpus.reread")
    if there is None:
        raise Whole("there is no plan yet")
    try:
        listed = read_list(there.store, there.plan)
    except (CorruptShard, FormatVersionError) as error:
        raise Whole(str(error)) from None
    if listed is None:
        raise Whole("the dump has no list of the files")
    if not listed.ids_differ:
        raise Whole("several documents have the same id")
    plan = there.plan["corpus"]
    sample = plan.get("rendering", {}).get("sample", "")
    known = ListedCorpus(config.corpus, model.tokenizer, listed, sample)
    fits = known.is_decided and known.fingerprint == plan["fingerprint"]
    if not fits or len(known) != plan.get("documents"):
        raise Whole("the dump's list of the files does not fit these settings")
    return known


def check_files(known: ListedCorpus, files: list[str], sizes: list[int | None]) -> None:
    """PlanMismatch where names or sizes are not those of the list."""
    lines = list(known.differences(files, sizes))
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise PlanMismatch(
            f"corpus {known.config.path}: its files are not those that the dump was planned from:\n"
            + "\n".join(f"  {line}" for line in (*lines[:SHOWN], *more))
            + "\nRestore them, or choose another output directory."
        )


def write_list(dump: Dump, corpus: Corpus) -> None:
    """Write the list of the corpus's files, if there is none and the dump is not finished.

    Raises StoreError.
    """
    name = list_file(dump.plan)
    if name is None or isinstance(corpus, CorpusPart) or len(corpus.files) < 2:
        return
    if dump.store.exists(name) or dump.store.exists("manifest.json"):
        return
    listed = list_of(corpus)
    data = b"" if listed is None else listed.pack()
    if data and len(data) <= MOST_BYTES:
        dump.store.create(name, data)


def sum_of(sizes: list[int | None]) -> int:
    """Bytes of files, of those whose size is known."""
    return sum(size or 0 for size in sizes)


def in_words(size: int) -> str:
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{size / unit:,.1f} {name}"
