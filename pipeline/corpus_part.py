"""The documents of some consecutive files of a corpus, with the numbers that they have in it.

Only these files are copied, hashed and read. All else follows from the list of the files that a
dump keeps, and each file is compared with it.
"""

from functools import cached_property
from typing import Any

import datasets

from pipeline.corpus import Corpus
from pipeline.corpus_cache import rows_of_files
from pipeline.listed_corpus import ListedCorpus
from pipeline.positions import Share
from pipeline.types import Json
from storage.errors import PlanMismatch


class CorpusPart(Corpus):
    """A corpus whose documents outside some files are not there: what is asked for must be inside.

    Its number of documents, its fingerprint and their ids are those of the whole corpus. Raises
    what Corpus does, and PlanMismatch that names a file which is not as the list has it.
    """

    ids_differ = True

    def __init__(
        self,
        known: ListedCorpus,
        files: list[str],
        which: range,
        max_length: int,
        add_eos: bool = True,
        share: Share | None = None,
    ) -> None:
        """`files` are those of the whole corpus, `which` the numbers of those that are here."""
        self.known, self.which = known, which
        self.own = files[which.start : which.stop]
        self.before = sum(known.listed.documents[: which.start])
        super().__init__(known.config, known.tokenizer, max_length, add_eos, share)
        samples = [self.sample_of(*known.spans[at]) for at in which]
        self.compare("tokens of its first document (hash)", known.listed.samples, samples)

    def find_files(self) -> list[str]:
        return self.own

    def make_digests(self) -> list[str]:
        found = super().make_digests()
        self.compare("sha256", self.known.listed.sha256, found)
        return found

    def read_documents(self) -> datasets.Dataset:
        found = super().read_documents()
        rows = rows_of_files(self.sources, self.digests)
        self.compare("documents", self.known.listed.documents, rows)
        return found

    def compare(self, what: str, listed: list[Any], found: list[Any]) -> None:
        """PlanMismatch that names the first file that is not as the list has it."""
        for file, at, here in zip(self.own, self.which, found, strict=True):
            if here != listed[at]:
                raise PlanMismatch(
                    f"corpus {file}: {what}: {listed[at]} in the list of the dump's files, {here} "
                    "here. Restore what the dump was planned with: the file, the tokenizer, the "
                    "release; or choose another output directory"
                )

    def guess_mask(self, copies: list[tuple[str, str]]) -> str | None:
        found: str | None = self.known.listed.first["mask"]
        return found

    @cached_property
    def holds_messages(self) -> bool:
        if self.config.prompt_column is None:
            return self.config.messages_column is not None
        return bool(self.known.listed.first["messages"])

    def __len__(self) -> int:
        return len(self.known)

    def content(self) -> list[Any]:
        return self.known.content

    def rendering(self) -> Json:
        """The plan's sample: `__init__` has seen to it that the own files give the same tokens."""
        found = {"sample": self.known.sample}
        return found | ({"chat_template": self.chat.identity()} if self.chat else {})
