"""Which files a corpus has: chosen by their names, before any of them is opened."""

import os
import re
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError
from pipeline.outside import failure, is_outside
from pipeline.saved_datasets import saved_files

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
HIDDEN = (".", "_")  # first characters, as for Spark and pyarrow.dataset
ABOUT = re.compile(r"(readme|licen[cs]e|copying)([-._]|$)", re.IGNORECASE)
ABOUT_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def find_files(path: str, split: str = "train") -> list[str]:
    """Sorted files of a path, directory or glob, local or remote (s3://…); empty for a hub name.

    What exists under the very name is never taken for a pattern. A directory or glob leaves out
    hidden files and what describes the data; a directory has splits where its files' names do.
    Raises ConfigError for a path without files, for an unknown or mixed format, for a split that
    is not there, and for a link that leads out of a directory; FailedError where a store does not
    answer.
    """
    path = os.path.expanduser(path)
    try:
        fs, root = place_of(path)
        kind = kind_of(fs, root)
        if kind == "file":
            files = of_split([root], split, path)
        elif kind == "directory":
            files = files_of_folder(fs, root, split)
        else:
            files = of_split(files_of_glob(fs, root), split, path)
    except ConfigError:
        raise
    except Exception as error:  # every file system library raises its own types
        message = f"corpus {path}: cannot be read: {type(error).__name__}: {error}"
        raise failure(message, error) from error
    remote = not isinstance(fs, LocalFileSystem)
    if remote:
        files = [fs.unstrip_protocol(file) for file in files]
    looks_local = path.startswith((".", "/")) or path.count("/") > 1 or format_of(path)
    if not files and (remote or looks_local or fsspec.core.has_magic(path)):
        raise ConfigError(f"corpus {path}: no such file or directory, and no match for a glob")
    check_formats(path, files)
    return files


def place_of(path: str) -> tuple[Any, str]:
    """(file system, path on it). A local file may have any name, also one like a URL."""
    if os.path.exists(path):
        return LocalFileSystem(), os.path.abspath(path)
    fs, root = fsspec.core.url_to_fs(path)
    return fs, root


def sizes_of(files: list[str]) -> list[int | None]:
    """Bytes of files that `find_files` found, as their file system lists them; None where it does
    not say. Raises what `find_files` does."""
    fs, _ = place_of(files[0])
    try:
        found: list[int | None] = fs.sizes([place_of(file)[1] for file in files])
    except Exception as error:  # every file system library raises its own types
        message = f"corpus {files[0]}: cannot be listed: {type(error).__name__}: {error}"
        raise failure(message, error) from error
    return found


def kind_of(fs: Any, root: str) -> str | None:
    """file, directory, or None where there is neither. Raises what the file system raises.

    The file systems' own `isfile` takes a store that does not answer for one without the file.
    """
    if isinstance(fs, LocalFileSystem):
        return "file" if os.path.isfile(root) else "directory" if os.path.isdir(root) else None
    try:
        return str(fs.info(root)["type"])
    except FileNotFoundError as error:
        if is_outside(error):
            raise
        return None


def files_of_folder(fs: Any, root: str, split: str) -> list[str]:
    saved = saved_files(fs, root, split)
    if saved is not None:
        if isinstance(fs, LocalFileSystem):
            check_links(saved, root)
        return saved
    found = local_files(root) if isinstance(fs, LocalFileSystem) else sorted(fs.find(root))
    kinds = {*FORMATS.values()} - {"arrow"}  # those of a folder may be a cache
    files = [file for file in found if format_of(file) in kinds]
    files = [file for file in files if is_data(parts_below(file, root))]
    if not files:
        raise ConfigError(
            f"corpus {root}: no JSONL, Parquet or text file in this directory, and `datasets` did "
            "not save it. Name Arrow files with a glob"
        )
    return choose_split(files, root, split)


def local_files(root: str) -> list[str]:
    """All files below a folder. Links to folders are not followed."""
    found = []
    for folder, folders, names in os.walk(root, onerror=raise_it):
        paths = [os.path.join(folder, name) for name in names]
        check_links([*paths, *(os.path.join(folder, name) for name in folders)], root)
        found += [path for path in paths if os.path.isfile(path)]
    return sorted(found)


def raise_it(error: OSError) -> None:
    raise error


def files_of_glob(fs: Any, root: str) -> list[str]:
    """Matches of a pattern. Hidden files and those about the data match only by their own name."""
    pattern = root.split("/")
    first = next((at for at, part in enumerate(pattern) if has_magic(part)), len(pattern))
    base = "/".join(pattern[:first]) or "/"
    files = [file for file in fs.glob(root) if fs.isfile(file)]
    named = {part for part in pattern[first:] if not has_magic(part)}
    dotted = tuple(part[0] for part in pattern[first:] if part.startswith(HIDDEN))
    found = []
    for file in sorted(files):
        parts = [part for part in parts_below(file, base) if part not in named]
        if not parts or is_data(parts, dotted):
            found.append(file)
    if isinstance(fs, LocalFileSystem):
        check_links(found, base)
    return found


def has_magic(part: str) -> bool:
    return bool(fsspec.core.has_magic(part))


def parts_below(file: str, root: str) -> list[str]:
    return os.path.relpath(file, root).split(os.sep)


def is_data(parts: list[str], shown: tuple[str, ...] = ()) -> bool:
    """Not hidden, and not a file about the data. `shown`: first characters that do not hide."""
    hidden = tuple(first for first in HIDDEN if first not in shown)
    about = format_of(parts[-1]) == "text" and ABOUT.match(parts[-1])
    return not (
        any(part.startswith(hidden) for part in parts if hidden)
        or about
        or parts[-1] in ABOUT_DATASETS
    )


def check_links(paths: list[str], root: str) -> None:
    """Refuse a link that leads out of the folder, as into another user's files.

    The hub's cache may: its snapshots are links to blobs beside them.
    """
    real_root = Path(os.path.realpath(root))
    snapshots = [each for each in (real_root, *real_root.parents) if each.name == "snapshots"]
    allowed = [real_root, *(each.parent / "blobs" for each in snapshots)]
    for path in paths:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(each) for each in allowed):
            raise ConfigError(
                f"corpus {path}: a link leads out of the directory {root}, to {real}. Name that "
                "file or directory itself, or copy it"
            )


def choose_split(files: list[str], root: str, split: str) -> list[str]:
    """The files of one split, where their names have splits; otherwise all files."""
    split_by = {file: split_of(parts_below(file, root), split) for file in files}
    kinds = set(split_by.values())
    asked = canonical(split)
    if kinds == {None} or (None in kinds and kinds == {None, asked}):
        return of_split(files, split, root)
    if None in kinds:
        one = next(file for file in files if split_by[file] is None)
        other = next(file for file in files if split_by[file] not in (None, asked))
        raise ConfigError(
            f"corpus {root}: {other} has a name like the split {split_by[other]!r}, but {one} "
            "belongs to no split. Name the files to read with a glob, such as "
            f"{root}/*{os.path.splitext(one)[1]}"
        )
    if asked not in kinds:
        raise ConfigError(
            f"corpus {root}: no file of the split {split!r}; there are files of "
            f"{', '.join(sorted(map(str, kinds)))}. Set corpus.split, or name the files"
        )
    return [file for file in files if split_by[file] == asked]


def of_split(files: list[str], split: str, path: str) -> list[str]:
    """`files`. ConfigError where another split than the default is asked of files without one."""
    for file in files:
        if split != "train" and split_of([os.path.basename(file)], split) != canonical(split):
            raise ConfigError(
                f"corpus {path}: split {split!r} is asked for, but {file} does not have it in its "
                "name. Leave corpus.split out: each file is read as a whole"
            )
    return files


def canonical(split: str) -> str:
    return next((name for name, words in SPLITS.items() if split in words), split)


def split_of(parts: list[str], asked: str) -> str | None:
    """The split that a file's path names, or None.

    A name belongs to a split if it begins or ends with the split's word: test-00000-of-00002,
    wiki_test. The name of a text file, which may be a title, must be the word itself.
    """
    whole = format_of(parts[-1]) == "text"
    for part in [stem_of(parts[-1]), *reversed(parts[:-1])]:
        if re.sub(r"-\d+-of-\d+$", "", part) == asked:
            return canonical(asked)
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word and word != "of"]
        ends = words if whole and len(words) == 1 else [] if whole else [*words[:1], *words[-1:]]
        for name, known in SPLITS.items():
            if any(word in known for word in ends):
                return name
    return None


def check_formats(path: str, files: list[str]) -> None:
    """ConfigError for a file of an unknown format, and for files of several formats."""
    formats = {format_of(file) for file in files}
    if None in formats:
        wrong = next(file for file in files if not format_of(file))
        raise ConfigError(
            f"corpus {wrong}: unknown kind of file; expected {', '.join(FORMATS)}, also with "
            f"{' or '.join(COMPRESSED)}"
        )
    if len(formats) > 1:
        raise ConfigError(
            f"corpus {path}: expected files of one format, found {sorted(map(str, formats))}"
        )


def format_of(file: str) -> str | None:
    """json, parquet, arrow, text, or None for an unknown kind of file."""
    return FORMATS.get(os.path.splitext(without_compression(file))[1].lower())


def without_compression(file: str) -> str:
    stem, suffix = os.path.splitext(file)
    return stem if suffix.lower() in COMPRESSED else file


def stem_of(file: str) -> str:
    """A file's name without the suffixes of its format and compression."""
    return os.path.splitext(os.path.basename(without_compression(file)))[0]


def compression_of(file: str) -> str | None:
    """gzip, zstd or None, by the file's name."""
    return COMPRESSED.get(os.path.splitext(file)[1].lower())


def relative(files: list[str]) -> list[str]:
    """Each file's path below the folder that holds them all: the same on every machine."""
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    return [os.path.relpath(file, root) for file in files]
