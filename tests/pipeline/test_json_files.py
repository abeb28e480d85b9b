"""Small JSON files."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.json_files import read_object, strict, write_json

NUMBERS = st.floats() | st.integers() | st.none() | st.booleans() | st.text()


def refuse(constant: str) -> None:
    raise ValueError(f"not JSON: {constant}")


@given(st.recursive(NUMBERS, lambda of: st.lists(of) | st.dictionaries(st.text(), of)))
def test_every_number_is_strict_json(value: Any) -> None:
    json.loads(json.dumps(strict(value)), parse_constant=refuse)


@given(st.floats())
def test_float_reads_every_number_back(value: float) -> None:
    back = float(json.loads(json.dumps(strict(value))))
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_a_failed_write_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "summary.json"
    write_json(path, {"loss": 1.5})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"loss": 2.5})
    assert read_object(path) == {"loss": 1.5}
    assert list(path.parent.iterdir()) == [path]


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {})
    (tmp_path / "link.json").symlink_to("file.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert read_object(tmp_path / "file.json") == {"a": 1}
    write_json(Path(os.devnull), {"a": 1})
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("content", ["", '{"loss": 1', "[1]", "\0\0"])
def test_a_file_that_was_cut_short_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert read_object(tmp_path / "a.json") is None
    assert read_object(tmp_path / "none.json") is None
