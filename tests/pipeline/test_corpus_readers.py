"""What a file holds is what is read, byte for byte; what cannot be read names file and place."""

import gzip
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline import corpus_readers
from pipeline.corpus_readers import Document, Source
from pipeline.errors import ConfigError


def read(path: Path, column: str = "text", chat: bool = False) -> list[Document]:
    return list(Source(str(path), str(path), column, chat).documents())


def jsonl(folder: Path, *lines: str) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("id", "found"),
    [
        ('"2024-01-02"', "2024-01-02"),
        ('"2024-01-02T00:00:00"', "2024-01-02T00:00:00"),
        ('"007"', "007"),
        ("7", "7"),
        (str(2**64 - 1), str(2**64 - 1)),
        ("-3", "-3"),
        ("1.50", "1.50"),
        ("1e3", "1e3"),
        ("true", "true"),
        ("9" * 4096, "9" * 4096),
        ('{"a": 1}', '{"a": 1}'),
        ('""', ""),
        ("null", None),
    ],
)
def test_ids_are_as_the_file_spells_them(tmp_path: Path, id: str, found: str | None) -> None:
    path = jsonl(tmp_path, '{"text": "a", "id": "x"}', f'{{"text": "2024-01-02", "id": {id}}}')
    assert read(path) == [("a", "x"), ("2024-01-02", found)]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8")),
            st.none() | st.text(st.characters(codec="utf-8")) | st.integers(),
        )
    ),
    st.booleans(),
)
def test_json_round_trips(rows: list[tuple[str, Any]], ascii: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        documents = [{"text": text, "id": id, "other": [id]} for text, id in rows]
        path = jsonl(Path(folder), *(json.dumps(each, ensure_ascii=ascii) for each in documents))
        assert read(path) == [(text, None if id is None else str(id)) for text, id in rows]


@given(st.binary(max_size=50))
def test_text_is_read_byte_for_byte(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes(data)
        try:
            expected = data.decode()
        except UnicodeDecodeError:
            with pytest.raises(ConfigError, match=r"a\.txt, line \d+: not UTF-8"):
                read(path)
        else:
            assert read(path) == [(expected, None)]


@pytest.mark.parametrize(
    "others",
    [
        ["null", '{"source": "x"}'],
        ["1", "0.5"],
        ['{"a": 1}', '{"b": 1}'],
        ['"x"', "9" * 5000],
        ['"2024-01-01"', '"no date"'],
        ["[1]", '[1, "x", null]'],
    ],
)
def test_other_columns_do_no_harm(tmp_path: Path, others: list[str]) -> None:
    path = jsonl(tmp_path, *(f'{{"text": "a", "meta": {other}}}' for other in others))
    assert read(path) == [("a", None)] * 2


def test_columns_of_a_trace_are_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, '{"type": "user", "message": {"a": 1}, "text": "a"}')
    assert read(path) == [("a", None)]


def test_blank_lines_marks_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n\n  \n{"text": "b"}')
    assert read(path) == [("a\r\n", None), ("b", None)]


def test_an_array_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a", "id": 1}, {"text": "b"}], indent=1))
    assert read(path) == [("a", "1"), ("b", None)]


def test_messages_keep_their_keys_and_values(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2024-01-01", "n": 2**70}, {"role": "x", "y": None}]
    path = jsonl(tmp_path, json.dumps({"messages": messages}), '{"messages": null}')
    (first, _), (second, _) = read(path, "messages", chat=True)
    assert json.loads(first or "") == messages
    assert second is None


def test_messages_of_parquet_have_no_keys_that_arrow_added(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a", "name": None, "calls": None},
        {"role": "assistant", "content": "b", "name": "n", "calls": [{"f": "x"}, {"g": "y"}]},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    ((found, _),) = read(tmp_path / "a.parquet", "messages", chat=True)
    assert json.loads(found or "") == [{"role": "user", "content": "a"}, messages[1]]


def test_parquet_ids_and_texts(tmp_path: Path) -> None:
    table = pa.table(
        {
            "other": pa.array([b"\xff", b"\xfe", None], pa.binary()),
            "text": pa.array(["a", None, "c\r\n"], pa.large_string()),
            "id": pa.array([2**64 - 1, None, 7], pa.uint64()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    expected = [("a", str(2**64 - 1)), (None, None), ("c\r\n", "7")]
    assert read(tmp_path / "a.parquet") == expected


def test_parquet_larger_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_readers, "BATCH_BYTES", 300)
    texts = [f"{number} " * 9 for number in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=30)
    assert [text for text, _ in read(tmp_path / "a.parquet")] == texts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": 5}', "line 2: expected text in column 'text', found int"),
        ('{"text": ["a"]}', "line 1: expected text in column 'text', found list"),
        ('{"text": "a"}\n{"text"', "line 2: not JSON"),
        ('"a"', "line 1: expected a JSON object, found str"),
        ('{"a": 1, "b": 2}\n{"a": 1}', "no column 'text'; it has a, b"),
        ('{"text": "\\ud800 a"}', "line 1: .ud800 at character 0 is half a character"),
        ('{"text": "a", "id": "' + "x" * 5000 + '"}', "line 1: id of 5,000 characters"),
        ('{"text": ' + "[" * 20_000 + "]" * 20_000 + "}", "line 1: JSON that is nested too deep"),
        ('{"text": "a", "m": ' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}", "nested too deep"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read(jsonl(tmp_path, content))
    assert "a.jsonl" in str(error.value)


def test_a_column_may_be_missing_in_some_lines(tmp_path: Path) -> None:
    assert read(jsonl(tmp_path, '{"a": 1}', '{"text": "a"}')) == [(None, None), ("a", None)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.jsonl.zst", "a.json"])
def test_a_document_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(corpus_readers, "DOCUMENT_BYTES", 1000)
    text = "a" * 1001
    path = tmp_path / name
    data = json.dumps({"text": text}).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ["b", text]}), path)
    elif name == "a.json":
        path.write_bytes(b"[" + data + b"]")
    else:
        path.write_bytes(zstandard.compress(data) if name.endswith("zst") else data)
    with pytest.raises(ConfigError, match=rf"{name}.*: document of more than"):
        read(path)


LONG = "".join(chr(97 + at % 26) for at in range(3 << 20))


@pytest.mark.parametrize("chat", [False, True])
def test_a_row_group_of_long_rows_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    monkeypatch.setattr(corpus_readers, "DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(corpus_readers, "LINE_BYTES", 1000)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    rows = [[{"role": "user", "content": each}] if chat else each for each in ("a", LONG)]
    table = pa.table({"other": ["x" * 10, "y"], "text": rows})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    with pytest.raises(ConfigError, match=r"a\.parquet, row 1: document of more than"):
        read(tmp_path / "a.parquet", chat=chat)


def test_equal_messages_are_counted_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_readers, "LINE_BYTES", 1 << 20)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    messages = [{"role": "user"}] * (1 << 20)
    pq.write_table(pa.table({"text": [messages]}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    with pytest.raises(ConfigError, match=r"a\.parquet, row 0: document of more than"):
        read(tmp_path / "a.parquet", chat=True)


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("chat", [False, True])
def test_a_long_value_is_refused_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool, dictionary: bool
) -> None:
    monkeypatch.setattr(corpus_readers, "DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(corpus_readers, "LINE_BYTES", 1 << 20)
    monkeypatch.setattr(corpus_readers, "BATCH_ROWS", 4)
    texts = ["a"] * 10 + [LONG] + ["b"] * 5
    rows = [[{"role": "user", "content": each}] for each in texts] if chat else texts
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", use_dictionary=dictionary)
    found = Source(str(tmp_path / "a.parquet"), str(tmp_path / "a.parquet"), "text", chat)
    copied = []
    with pytest.raises(ConfigError, match=r"a\.parquet, row (10|4 or later): doc"):
        copied.extend(text for text, _ in found.documents())
    assert all(len(text or "") < 100 for text in copied)


@pytest.mark.parametrize("start", ["", "["])
def test_a_line_or_array_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    monkeypatch.setattr(corpus_readers, "LINE_BYTES", 1000)
    monkeypatch.setattr(corpus_readers, "ARRAY_BYTES", 1000)
    path = tmp_path / "a.json"
    path.write_text(start + json.dumps({"text": "a", "other": "b" * 1000}))
    with pytest.raises(ConfigError, match=r"a\.json.*: (line|array) of more than"):
        read(path)


def zstd_by_line(lines: list[bytes], whole: bool) -> bytes:
    """As a writer that flushes each line."""
    packer = zstandard.ZstdCompressor().compressobj()
    parts = [
        packer.compress(line) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for line in lines
    ]
    return b"".join([*parts, packer.flush()] if whole else parts)


LINES = [json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(300)]


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        ("zst", zstd_by_line(LINES, whole=False)),
        ("zst", zstd_by_line(LINES, whole=True)[:-3]),
        ("zst", zstandard.compress(b"".join(LINES))[:200]),
        ("gz", gzip.compress(b"".join(LINES))[:400]),
        ("gz", gzip.compress(b"".join(LINES))[:-4]),
        ("gz", b"".join(LINES)),
        ("zst", b"".join(LINES)),
        ("zst", b""),
        ("gz", b""),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_cut_file_is_refused(tmp_path: Path, kind: str, suffix: str, data: bytes) -> None:
    path = tmp_path / f"a.{kind}.{suffix}"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"a\.{kind}\.{suffix}: cannot be read"):
        read(path)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_joined_compressed_files_are_read_to_the_end(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / f"a.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(pack(b"".join(LINES[:200])) + pack(b"".join(LINES[200:])))
    assert len(read(path)) == 300


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"body": ["a"]}), "no column 'text'; it has body"),
        (pa.table({"text": [b"a"]}), "row 0: expected text in column 'text', found bytes"),
        (pa.table({"text": [1]}), "row 0: expected text in column 'text', found int"),
        (pa.table({"text": [["a"]]}), "row 0: expected text in column 'text', found list"),
        (pa.table({"text": [{"a": "b"}]}), "row 0: expected text in column 'text', found dict"),
        (
            pa.table({"text": pa.array([b"a", b"\xff"]).view(pa.string())}),
            "row 1: cannot be read: .*utf-8",
        ),
    ],
)
def test_bad_parquet_is_named(tmp_path: Path, table: pa.Table, words: str) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=rf"a\.parquet.*{words}"):
        read(tmp_path / "a.parquet")


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"a\.parquet: cannot be read"):
        read(tmp_path / "a.parquet")


def write_arrow(path: Path, table: pa.Table, footer: bool = False, rows: int = 10) -> Path:
    kind = pa.ipc.new_file if footer else pa.ipc.new_stream
    with kind(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("footer", [False, True])
def test_arrow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, footer: bool) -> None:
    monkeypatch.setattr(corpus_readers, "BATCH_BYTES", 100)
    texts = [None if number == 7 else f"{number} " * 9 for number in range(35)]
    chats = [[{"role": "user", "content": "a", "name": None}]] * 35
    table = pa.table({"other": [b"\xff"] * 35, "text": texts, "id": range(35), "messages": chats})
    path = write_arrow(tmp_path / "a.arrow", table, footer)
    assert read(path) == [(text, str(number)) for number, text in enumerate(texts)]
    found = read(path, "messages", chat=True)
    assert [json.loads(each) for each, _ in found] == [[{"role": "user", "content": "a"}]] * 35


@pytest.mark.parametrize("footer", [False, True])
@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"body": ["a"]}), "no column 'text'; it has body"),
        (pa.table({"text": ["a"] * 15 + [None]}).cast(pa.schema([("text", pa.binary())])), "bytes"),
        (pa.table({"text": [1] * 15}), "row 0: expected text in column 'text', found int"),
        (pa.table({"text": pa.array([b"a", b"\xff"]).view(pa.string())}), "cannot be read.*UTF8"),
        (pa.table({"text": ["a"] * 12 + [LONG]}), "row 12: document of more than"),
    ],
)
def test_bad_arrow_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: pa.Table, words: str, footer: bool
) -> None:
    monkeypatch.setattr(corpus_readers, "DOCUMENT_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match=rf"a\.arrow.*{words}"):
        read(write_arrow(tmp_path / "a.arrow", table, footer))


@pytest.mark.parametrize("footer", [False, True])
@pytest.mark.parametrize("kept", [0, 3, 100, -100])
def test_a_cut_arrow_file_is_refused(tmp_path: Path, kept: int, footer: bool) -> None:
    path = write_arrow(tmp_path / "a.arrow", pa.table({"text": ["a b c"] * 100}), footer)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"a\.arrow: cannot be read"):
        read(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_an_arrow_stream_is_read_whole_or_not_at_all(tmp_path: Path, legacy: bool) -> None:
    """Wherever it is cut, also at the end of a batch; and with more behind it."""
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["a b c"] * 12, "kind": pa.array(["x"] * 12).dictionary_encode()})
    options = pa.ipc.IpcWriteOptions(use_legacy_format=legacy)
    with pa.ipc.new_stream(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=5)
    data = path.read_bytes()
    assert len(read(path)) == 12
    at_a_boundary = 0
    for kept in range(1, len(data)):
        path.write_bytes(data[:kept])
        with pytest.raises(ConfigError, match=r"a\.arrow: (cannot be read|is cut short)") as error:
            read(path)
        at_a_boundary += "is cut short: expected the mark" in str(error.value)
    assert at_a_boundary == 1 + 1 + 3  # the schema, the dictionary, three batches
    for more in (data, bytes(8)):
        path.write_bytes(data + more)
        with pytest.raises(ConfigError, match=rf"ends at byte .* has {len(data + more):,} bytes"):
            read(path)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_stream_of_an_older_writer_is_whole(tmp_path: Path, rows: int) -> None:
    """Its mark has four bytes."""
    path = write_arrow(tmp_path / "a.arrow", pa.table({"text": pa.array(["a"] * rows, "string")}))
    data = path.read_bytes()
    assert data.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    path.write_bytes(data[:-8] + bytes(4))
    assert len(read(path)) == rows


def test_offsets_that_lead_out_of_an_arrow_file_are_refused(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", pa.table({"text": ["aaaa", "bbbb"]}))
    good, bad = (struct.pack("<3i", 0, middle, 8) for middle in (4, 1 << 30))
    data = path.read_bytes()
    assert data.count(good) == 1
    path.write_bytes(data.replace(good, bad))
    with pytest.raises(ConfigError, match=r"a\.arrow: cannot be read"):
        read(path)
