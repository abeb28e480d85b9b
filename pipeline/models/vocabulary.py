"""Whether heads and tokenizers belong together: a model's own, and those of a model and a dump.

Heads may have different widths. What is beyond the tokens of the base, padding columns and added
tokens, lies in the tail: see pipeline/losses.py.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.models.directory import TOKENIZER_FILES, ModelFolder, tokenizer_fingerprint
from pipeline.models.tokenizers import first_difference, vocabulary_of
from storage import LogitDataset
from storage.plan import needed

ROWS = 8  # of a dump, whose text both tokenizers must read alike
CHARACTERS = 4000  # of each
FILE_BYTES = 256 << 20


def check_ids(folder: ModelFolder) -> None:
    """ConfigError where the tokenizer has ids that the head lacks."""
    ids = vocabulary_of(folder.tokenizer)
    if ids > folder.vocab_size:
        raise ConfigError(
            f"model {folder}: its tokenizer has {ids} tokens, its head {folder.vocab_size}; one of "
            "them is another model's, or tokens were added without resizing the model"
        )


def difference_between(
    base: ModelFolder, other: ModelFolder, add_eos: bool, names: tuple[str, str]
) -> str | None:
    """What `other`'s tokenizer does differently from the base's, by an example; None if nothing."""
    if base.tokenizer_files() == other.tokenizer_files():
        return None
    return first_difference(base.tokenizer, other.tokenizer, (), add_eos, names)


def difference_from_dump(folder: ModelFolder, dump: LogitDataset, name: str) -> str | None:
    """What the model's tokenizer does differently from the dump's, by an example; None if nothing.

    Without the files of the dump's own tokenizer, fingerprints decide. `name` is said for the
    model.
    """
    files = tokenizer_files(dump)
    if files and files == folder.tokenizer_files():
        return None
    expected = needed(dump.plan, "tokenizer.fingerprint")
    found = tokenizer_fingerprint(folder.tokenizer)
    own, why = dump_tokenizer(files, str(folder.config.model_type), expected)
    if own is not None:
        texts = (
            str(own.decode(dump[row].input_ids, skip_special_tokens=True))[:CHARACTERS]
            for row in range(min(ROWS, len(dump)))
        )
        add_eos = bool(dump.plan.get("add_eos", True))
        return first_difference(own, folder.tokenizer, texts, add_eos, ("the dump", name))
    if expected == found:
        return None
    return (
        f"the tokenizer's fingerprint is {expected[:16]} in the dump, {found[:16]} in {name}. They "
        f"cannot be compared by what they do, because {why}. Put the tokenizer's files of the base "
        f"model into {dump.dump.store / 'tokenizer'}"
    )


def tokenizer_files(dump: LogitDataset) -> dict[str, bytes]:
    """The tokenizer's files that a dump carries, by name."""
    store = dump.dump.store
    found = {name: store.read(f"tokenizer/{name}", FILE_BYTES) for name in TOKENIZER_FILES}
    return {name: data for name, data in found.items() if data is not None}


def dump_tokenizer(
    files: dict[str, bytes], kind: str, fingerprint: str | None
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """(the tokenizer that a dump's files make, or None; why it cannot be used).

    `kind` is the model_type that chooses its class where the files do not; `fingerprint` is that of
    the plan.
    """
    if not files:
        return None, "the dump has no tokenizer files"
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        try:
            tokenizer = ModelFolder(folder).tokenizer
        except ConfigError as error:
            return None, f"the dump's tokenizer files cannot be read ({error})"
    if fingerprint not in (None, tokenizer_fingerprint(tokenizer)):
        return None, "the dump's tokenizer files are not those that its plan was made with"
    return tokenizer, ""
