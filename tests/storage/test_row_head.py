"""The head of a row stands in its payload, says which row it is, and is skipped by decoders."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import CorruptShard, FormatVersionError, StorageError, decode, encode
from storage.row_head import FIELDS, RowHead, find, insert
from tests.helpers.forged import strip
from tests.helpers.records import VOCAB, random_mask, random_topk

PLAN = "ab" * 32
IDS = np.arange(20, dtype=np.int32)


def payload(tokens: int = 20) -> bytes:
    return encode(random_topk(tokens - 1, 3), vocab_size=VOCAB)


def head(ids: np.ndarray = IDS, **changes: object) -> RowHead:
    given = {"shard": "00003/00007", "row": 5, "plan_sha256": PLAN, "doc_id": "doc", "chunk": 2}
    return RowHead(**{**given, "input_ids": ids, **changes})  # type: ignore[arg-type]


@given(
    st.lists(st.integers(0, (1 << 22) - 1), min_size=1, max_size=40),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.integers(-(1 << 31), (1 << 31) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 99_999),
    st.none() | st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_round_trip(
    ids: list[int], doc_id: str, chunk: int, crc: int, number: int, marks: list[bool] | None
) -> None:
    targets = None if marks is None or not any(marks[1 : len(ids)]) else np.array(marks[: len(ids)])
    given = head(
        np.array(ids, np.int32), doc_id=doc_id, chunk=chunk, samples_crc=crc, row=number,
        shard=f"{number:05d}/{number + 7:05d}", targets=targets,
    )  # fmt: skip
    plain = payload(len(ids))
    value = insert(plain, given)
    found = find(value)
    assert found is not None
    assert found.same(given)
    assert (found.targets is None) == (targets is None)
    assert found.targets is None or found.targets.tolist() == [False, *marks[1 : len(ids)]]
    found.check(given.shard, number, PLAN, len(ids))
    assert strip(value) == plain
    assert find(plain) is None
    assert np.array_equal(decode(value).ids, decode(plain).ids)


def test_a_row_s_ids_are_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    body = RowHead.body
    monkeypatch.setattr(RowHead, "body", lambda head: made.append(1) or body(head))
    insert(payload(), head())
    assert len(made) == 1


def test_apart_from_the_payload_it_belongs_to_it_as_well() -> None:
    plain = payload()
    packed = head().pack(b"", plain)
    assert RowHead.unpack(packed, b"", plain).same(head())
    with pytest.raises(CorruptShard, match="checksum"):
        RowHead.unpack(packed, b"", payload(21))


@pytest.mark.parametrize("targets", [None, random_mask(20)])
def test_every_changed_byte_is_found(targets: np.ndarray | None) -> None:
    """In the head and in the payload: other rows never come back."""
    own = head(targets=targets)
    value, truth = insert(payload(), own), decode(payload())
    for at in range(len(value)):
        bad = bytearray(value)
        bad[at] ^= 0x11
        try:
            found, topk = find(bytes(bad)), decode(bytes(bad))
        except StorageError:
            continue
        assert found is None or found.same(own)
        assert np.array_equal(topk.logprobs, truth.logprobs)


@pytest.mark.parametrize(
    "other",
    [{"row": 6}, {"shard": "00003/00008"}, {"shard": "00004/00007"}, {"plan_sha256": "00" * 32}],
)
def test_another_row_is_named(other: dict) -> None:
    with pytest.raises(CorruptShard, match="expected row 5 of shard 00003/00007, of 20 tokens"):
        head(**other).check("00003/00007", 5, PLAN, 20)


def test_a_mask_is_part_of_the_row() -> None:
    """Version 2 has a frame more; without a mask a head is of version 1, byte for byte."""
    targets = random_mask(20)
    masked, plain = head(targets=targets).pack(b"", b""), head().pack(b"", b"")
    assert (masked[4], plain[4]) == (2, 1)
    assert not head(targets=targets).same(head())
    other = np.concatenate([targets[:1], ~targets[1:]])
    assert not head(targets=targets).same(head(targets=other))
    for marks in (np.zeros(20, bool), np.ones(21, bool)):
        packed = head(targets=marks).pack(b"", payload())
        with pytest.raises(StorageError, match=r"marks no token|marks the first|3 bytes"):
            RowHead.unpack(packed, b"", payload())


def test_forged_heads_are_errors() -> None:
    """Every checksum right: claims are checked before they are allocated for."""
    plain = payload()
    good = head().pack(b"", plain)

    def forged(start: int, number: int, kind: str = "<I") -> bytes:
        body = bytearray(good[:-4])
        struct.pack_into(kind, body, start, number)
        crc = zlib.crc32(plain[:-4], zlib.crc32(bytes(body)))
        return bytes(body) + struct.pack("<I", crc)

    with pytest.raises(FormatVersionError, match=r"row head of version 9, .* update mol-distill"):
        RowHead.unpack(forged(4, 9, "<B"), b"", plain)
    tokens, length = 8 + 16, 8 + 20
    for bad in [
        forged(5, 200, "<B"),
        forged(5, 0, "<B"),
        forged(tokens, 1 << 31),
        forged(length, (1 << 32) - 1),
        forged(FIELDS.size, (1 << 32) - 1),
        b"",
        good[:30],
    ]:
        with pytest.raises(StorageError):
            RowHead.unpack(bad, b"", plain)
    none = head(np.zeros(20, np.int32)).pack(b"", plain)
    assert not RowHead.unpack(none, b"", plain).input_ids.any()
    huge = bytearray(none[:-4])
    struct.pack_into("<I", huge, tokens, 1 << 31)
    crc = zlib.crc32(plain[:-4], zlib.crc32(bytes(huge)))
    with pytest.raises(CorruptShard, match="2147483648 tokens without a plane"):
        RowHead.unpack(bytes(huge) + struct.pack("<I", crc), b"", plain)


@pytest.mark.parametrize("value", [b"", b"MoLk"])
def test_a_payload_cut_short_is_named(value: bytes) -> None:
    with pytest.raises(CorruptShard, match=f"a payload of {len(value)} bytes"):
        find(value)


@pytest.mark.parametrize("value", [bytes(48), bytes(60), b"\xff" * 60, b"\xff" * 2000])
def test_what_is_no_payload_has_no_head(value: bytes) -> None:
    assert find(value) is None
