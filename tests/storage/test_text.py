"""Foreign text is printed, not executed."""

import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.__main__ import main
from storage.errors import CorruptShard
from storage.text import KEPT, UNSAFE, one_line, printable
from tests.helpers.forged import data_file, rewrite, seal, with_column
from tests.helpers.records import make_dump

ESC = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("a\x1b[2J\x9b\u202eb\ud800\r") == r"a\x1b[2J\x9b\u202eb\ud800\r"
    assert printable("Grüße, 世界 👩\u200d🚀\n\tend") == "Grüße, 世界 👩\u200d🚀\n\tend"
    assert one_line("a\nFAULT  b") == r"a\nFAULT  b"


@given(st.text())
def test_nothing_unsafe_is_left(text: str) -> None:
    shown = printable(text)
    assert all(c in KEPT or unicodedata.category(c) not in UNSAFE for c in shown)
    assert not {"\x1b", "\r", "\x9b", "\u202e"} & set(shown)
    assert printable(shown) == shown


def test_errors_are_safe() -> None:
    assert "\x1b" not in str(CorruptShard(f"{ESC}: no"))


@pytest.mark.parametrize("command", ["inspect", "inspect --row 0", "verify", "gc --older-than=-1"])
def test_commands_print_no_control_characters(  # type: ignore[no-untyped-def]
    tmp_path: Path, command: str, capsys
) -> None:
    make_dump(tmp_path, shards=1, rows=3, teacher={"name": f"x{ESC}"}, corpus={ESC: "x"})
    names = with_column("doc_id", lambda _: pa.array([f"doc{ESC}", "b", "c"]))
    rewrite(tmp_path, names)
    (tmp_path / "00000" / f"00009-{ESC[:-1]}\n.parquet").write_bytes(b"x")
    name, *options = command.split()
    good = main([name, str(tmp_path), *options])
    rewrite(tmp_path, metadata={b"shard": ESC.encode()})
    bad = main([name, str(tmp_path), *options])
    seal(tmp_path, marker={"file": f"{data_file(tmp_path).name}{ESC}"})
    worse = main([name, str(tmp_path), *options])
    shown = "".join(capsys.readouterr())
    assert (good, worse) == (0, 4)
    assert bad in (0, 4)
    assert not set(shown) & set(ESC) - set(ESC).intersection(map(chr, range(32, 127)))
    assert "owned" in shown or name == "gc"


def test_a_tokenizer_that_is_none_shows_ids(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    make_dump(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_bytes(b"\xff{")
    assert main(["inspect", str(tmp_path), "--row", "0"]) == 0
    assert "tokenizer/tokenizer.json: " in capsys.readouterr().out
