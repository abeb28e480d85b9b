"""Folders that `datasets` saved with save_to_disk: which Arrow files they hold, in which order.

Their state.json is the truth. Beside its files may lie those of an earlier, larger dataset and what
`map` cached.
"""

import json
import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError

STATE, SPLITS = "state.json", "dataset_dict.json"
JSON_BYTES = 16 << 20


def saved_files(fs: Any, root: str, split: str) -> list[str] | None:
    """Paths of the files of a dataset, or of one split of a DatasetDict; None for another folder.

    Raises ConfigError for a split that is not there, and for JSON that `datasets` does not write.
    """
    splits = (read(fs, f"{root}/{SPLITS}") or {}).get("splits")
    if isinstance(splits, list):
        if split not in splits:
            raise ConfigError(
                f"corpus {root}: no split {split!r}; the datasets saved there are "
                f"{', '.join(map(str, splits)) or 'none'}. Set corpus.split"
            )
        root = f"{root}/{split}"
    state = read(fs, f"{root}/{STATE}") or {}
    files = state.get("_data_files")
    if files is None and splits is None:
        return None
    if not isinstance(splits, list) and split not in ("train", state.get("_split")):
        raise ConfigError(
            f"corpus {root}: split {split!r} is asked for, but the dataset saved there is "
            f"{state.get('_split') or 'no split'}. Leave corpus.split out: it is read as a whole"
        )
    paths = [f"{root}/{name_of(file, root)}" for file in listed(files, root)]
    for path in paths if isinstance(fs, LocalFileSystem) else []:
        if not os.path.isfile(path):
            raise ConfigError(f"corpus {path}: no such file, but {STATE} names it. Copy it again")
    return paths


def read(fs: Any, path: str) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is no such file, or it holds something else."""
    if isinstance(fs, LocalFileSystem) and not os.path.isfile(path):
        return None  # a pipe would never end
    try:
        with fs.open(path, "rb") as file:
            value = json.loads(file.read(JSON_BYTES))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def listed(files: Any, root: str) -> list[Any]:
    if not isinstance(files, list) or not files:
        raise ConfigError(
            f"corpus {root}/{STATE}: expected a list of files in _data_files, as save_to_disk "
            "writes it. Save the dataset again"
        )
    return files


def name_of(file: Any, root: str) -> str:
    """The name of one file in the folder itself."""
    name = file.get("filename") if isinstance(file, dict) else None
    if not isinstance(name, str) or not name.endswith(".arrow") or "/" in name:
        raise ConfigError(
            f"corpus {root}/{STATE}: expected the name of an Arrow file in that folder, found "
            f"{name!r}. Save the dataset again"
        )
    return name
