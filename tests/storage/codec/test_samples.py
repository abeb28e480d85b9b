"""The payload of samples: round trips and damage."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import CorruptPayload, FormatVersionError, StorageError, TopK
from storage.codec import samples as sampled
from storage.codec.frames import deflate, join
from storage.samples import fault
from storage.topk import check_topk
from tests.helpers.records import VOCAB, sampled_topks, some_samples


@given(sampled_topks())
@settings(deadline=None, max_examples=150)
def test_round_trip_is_exact(made: tuple[TopK, int]) -> None:
    topk, vocab_size = made
    check_topk(topk, vocab_size)
    assert topk.samples is not None
    data = sampled.pack(topk.samples, vocab_size)
    found = sampled.unpack(data)
    assert found.same(topk.samples)
    assert (found.counts.dtype, found.ids.dtype, found.times.dtype) == ("u2", "i4", "u2")
    assert sampled.pack(found, vocab_size) == data


def test_every_flipped_byte_is_detected() -> None:
    data = sampled.pack(some_samples(), VOCAB)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x41
        with pytest.raises((CorruptPayload, FormatVersionError)):
            sampled.unpack(bytes(damaged))


@given(st.integers(0, 400), st.binary(max_size=400))
@settings(deadline=None)
def test_cut_or_foreign_bytes_are_errors(length: int, foreign: bytes) -> None:
    data = sampled.pack(some_samples(), VOCAB)
    for bad in (data[: min(length, len(data) - 1)], foreign, data + b"\0"):
        with pytest.raises((CorruptPayload, FormatVersionError)):
            sampled.unpack(bad)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_forged_samples_are_errors_or_samples(drawn: st.DataObject) -> None:
    """A changed header with a correct checksum, before good frames."""
    data = bytearray(sampled.pack(some_samples(), VOCAB))
    for _ in range(drawn.draw(st.integers(1, 3))):
        data[drawn.draw(st.integers(5, sampled.HEADER.size - 5))] = drawn.draw(st.integers(0, 255))
    data[sampled.HEADER.size - 4 : sampled.HEADER.size] = zlib.crc32(
        data[: sampled.HEADER.size - 4]
    ).to_bytes(4, "little")
    try:
        found = sampled.unpack(bytes(data))
    except StorageError:
        return
    assert len(found.ids) == len(found.times) == found.counts.sum()


@given(st.data())
@settings(deadline=None, max_examples=400)
def test_any_planes_are_errors_or_samples(drawn: st.DataObject) -> None:
    """Good frames of any content, as a foreign writer's bug or malice would make them."""
    vocab_size = drawn.draw(st.sampled_from([0, 1, 5, 300, 1 << 31, (1 << 32) - 1]))
    draws, positions = drawn.draw(st.integers(0, 4)), drawn.draw(st.integers(0, 4))
    counts = drawn.draw(st.lists(st.integers(0, 4), min_size=positions, max_size=positions))
    width, more = drawn.draw(st.integers(1, 4)), drawn.draw(st.integers(0, 2))
    sizes = [sum(counts)] * (width + more)
    parts = [bytes(counts), *(drawn.draw(st.binary(min_size=n, max_size=n)) for n in sizes)]
    header = sampled.Header(
        sampled.Planes(1, width, more), draws, vocab_size, positions, sum(counts)
    )
    try:
        found = sampled.unpack(join(header.pack(), deflate([parts])))
    except StorageError:
        return
    assert fault(found, vocab_size) is None
    assert found.counts.tolist() == counts


def test_a_lying_header_allocates_nothing() -> None:
    header = sampled.Header(sampled.Planes(2, 1, 0), 65535, 1 << 20, 1 << 24, 1 << 31)
    with pytest.raises(CorruptPayload):
        sampled.unpack(header.pack() + bytes(12))
