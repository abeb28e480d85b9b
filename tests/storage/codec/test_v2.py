"""Version 2: round trips through the tables of a shard, damage, and what it refuses."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import CorruptPayload, InvalidRecord, StorageError, Successors, TopK, decode, encode
from storage.codec.codec import pack, unpack
from storage.codec.frames import HEADER
from storage.codec.grid import Grid, quantise
from storage.codec.v2_kernels import HOPS, MATCH, matches
from tests.helpers.records import VOCAB, random_mask, random_topk


def learned(
    topks: list[TopK],
    vocab_size: int = VOCAB,
    step: float = 1 / 16,
    seed: int = 0,
    masks: list[np.ndarray] | None = None,
) -> tuple[Successors, list[np.ndarray], list[Grid]]:
    """Tables learned from these distributions, over random tokens from a small range."""
    rng = np.random.default_rng(seed)
    lengths = [len(topk) + 1 for topk in topks] if masks is None else map(len, masks)
    inputs = [rng.integers(0, min(9, vocab_size), n).astype(np.int32) for n in lengths]
    grids = [quantise(topk, vocab_size, step) for topk in topks]
    rows = list(zip(inputs, grids, strict=True))
    return Successors.learn(rows, vocab_size, masks), inputs, grids


def alike(positions: int, count: int, vocab_size: int, seed: int = 0) -> TopK:
    """Distributions that resemble each other, as a model's do."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, vocab_size) + rng.normal(0, 1, (positions, vocab_size))
    full = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-full, axis=1)[:, :count]
    logprobs = np.take_along_axis(full, ids, 1)
    tail = np.log(np.maximum(1 - np.exp(logprobs).sum(1), 1e-9))
    return TopK.from_dense(ids, logprobs, tail)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[TopK, int]:
    vocab_size = draw(st.sampled_from([2, 3, 50, 257, 5000, 70_000, 1 << 20]))
    positions = draw(st.integers(0, 12))
    count = st.integers(0, min(vocab_size, 300))
    counts = draw(st.lists(count, min_size=positions, max_size=positions) | count)
    vocab = min(vocab_size, 5000)  # of a large vocabulary, ids all over it
    topk = random_topk(positions, np.minimum(counts, vocab), vocab, draw(st.integers(0, 99)))
    ids = topk.ids.astype(np.int64) * (vocab_size - 1) // max(vocab - 1, 1)
    return TopK(topk.counts, ids.astype(np.int32), topk.logprobs, topk.tail_logprob), vocab_size


@given(shapes(), st.sampled_from([1 / 64, 1 / 16, 1 / 4, 1.0]))
@settings(deadline=None, max_examples=150)
def test_round_trip(made: tuple[TopK, int], step: float) -> None:
    topk, vocab_size = made
    successors, (input_ids,), (grid,) = learned([topk], vocab_size, step)
    successors = Successors.unpack(successors.pack())
    row = successors.row(input_ids)
    data = encode(topk, vocab_size=vocab_size, step=step, ranks=row)
    assert data[4] == 2
    assert unpack(data, row).same(grid)
    found = decode(data, row)
    np.testing.assert_array_equal(found.counts, topk.counts)
    np.testing.assert_allclose(found.tail_logprob, topk.tail_logprob, atol=step + 1e-4)
    np.testing.assert_allclose(found.logprobs, topk.logprobs, atol=step + 1e-4)
    total = found.kept_mass() + np.exp(found.tail_logprob.astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(0, 40), st.integers(0, 99))
@settings(deadline=None)
def test_round_trip_of_any_mask(mask: list[bool], count: int, seed: int) -> None:
    targets = np.array(mask)
    topk = random_topk(int(targets[1:].sum()), count, seed=seed)
    successors, (input_ids,), (grid,) = learned([topk], seed=seed, masks=[targets])
    successors = Successors.unpack(successors.pack())
    row = successors.row(input_ids, targets)
    assert unpack(pack(grid, row), row).same(grid)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60),
)
def test_matches_are_those_of_the_real_tokens_before(tokens: list[tuple[int, bool]]) -> None:
    """Compared with the definition in FORMAT.md, one position at a time."""
    input_ids = np.array([token for token, _ in tokens], np.int32)
    positions = np.flatnonzero([stored for _, stored in tokens]).astype(np.int64)
    place, length = matches(input_ids, positions)
    ids = input_ids.tolist()
    for t, here in enumerate(positions.tolist()):
        best = (0, -1)
        earlier = [m for m in range(t) if ids[positions[m]] == ids[here]][-HOPS:]
        for m in earlier:
            there = int(positions[m])
            same = 0
            while same < MATCH and same <= there and ids[there - same] == ids[here - same]:
                same += 1
            best = max(best, (same, m))
        assert (length[t], place[t]) == best


def test_a_mask_of_all_tokens_costs_nothing() -> None:
    """The coded entries are those without a mask; only the checksums differ."""
    (topk,) = topks = [alike(60, 16, VOCAB)]
    successors, (input_ids,), (grid,) = learned(topks)
    masked, _, _ = learned(topks, masks=[np.ones(61, bool)])
    assert masked.checksum == successors.checksum
    plain = pack(grid, successors.row(input_ids))
    data = pack(grid, successors.row(input_ids, np.ones(61, bool)))
    assert data[: HEADER.size - 8] == plain[: HEADER.size - 8]
    assert data[HEADER.size : -4] == plain[HEADER.size : -4]
    assert len(topk) == 60


def test_a_payload_wants_its_own_mask() -> None:
    """Another one with as many positions, none, and one of another length."""
    targets = random_mask(60)
    other = np.concatenate([targets[:1], np.roll(targets[1:], 1)])
    topk = alike(int(targets[1:].sum()), 16, VOCAB)
    successors, (input_ids,), (grid,) = learned([topk], masks=[targets])
    data = pack(grid, successors.row(input_ids, targets))
    first = np.concatenate([~targets[:1], targets[1:]])  # its mark has no meaning
    assert unpack(data, successors.row(input_ids, first)).same(grid)
    for wrong in (other, None):
        with pytest.raises(CorruptPayload, match=r"pass successors.row\(input_ids, targets\)"):
            unpack(data, successors.row(input_ids, wrong))
    with pytest.raises(CorruptPayload, match="a mask of 59 tokens for 60 input ids"):
        successors.row(input_ids, targets[1:])


def test_all_of_a_vocabulary_and_none() -> None:
    topk = random_topk(3, [65_535, 0, 1], 65_536)
    successors, (input_ids,), (grid,) = learned([topk], 65_536)
    row = successors.row(input_ids)
    assert unpack(pack(grid, row), row).same(grid)


def test_rows_decode_alone_and_in_any_order() -> None:
    topks = [alike(40, 16, VOCAB, seed) for seed in range(6)]
    successors, inputs, grids = learned(topks)
    rows = [successors.row(input_ids) for input_ids in inputs]
    payloads = [pack(grid, row) for grid, row in zip(grids, rows, strict=True)]
    for at in (5, 0, 3, 3):
        assert unpack(payloads[at], rows[at]).same(grids[at])


def test_equal_entries_are_the_only_ones_to_change_places() -> None:
    topk = alike(50, 32, VOCAB)
    successors, (input_ids,), (grid,) = learned([topk], step=1 / 2)
    row = successors.row(input_ids)
    found = unpack(pack(grid, row), row)
    np.testing.assert_array_equal(found.below, grid.below)  # descending probability as ever
    assert (found.ids != grid.ids).any()
    rises = np.diff(found.ids) > 0
    inside = np.diff(np.repeat(np.arange(50), found.counts)) == 0
    assert rises[(np.diff(found.below.astype(np.int64)) == 0) & inside].all()
    swapped = Grid(**{**vars(found), "ids": found.ids[::-1].copy()})
    assert not swapped.same(grid)


def test_what_cannot_be_written_falls_back_to_version_1() -> None:
    topk = TopK(
        np.array([2], np.uint16), np.array([4, 5], np.int32),
        np.array([-0.001, -900], np.float32), np.array([-7], np.float32),
    )  # fmt: skip
    successors, (input_ids,), (grid,) = learned([topk])
    row = successors.row(input_ids)
    data = pack(grid, row)
    assert data[4] == 1
    assert unpack(data, row).same(grid)


def test_a_payload_wants_its_own_tables_and_its_own_row() -> None:
    topks = [alike(40, 16, VOCAB, seed) for seed in range(2)]
    successors, inputs, grids = learned(topks)
    data = pack(grids[0], successors.row(inputs[0]))
    other, _, _ = learned(topks[1:])
    for wrong in (None, successors.ranks, successors.row(inputs[1]), other.row(inputs[0])):
        with pytest.raises(CorruptPayload, match=r"successors of its own shard"):
            unpack(data, wrong)
    with pytest.raises(InvalidRecord, match="40 positions, the row has 39"):
        pack(grids[0], successors.row(inputs[0][:-1]))


def test_every_flipped_byte_is_detected() -> None:
    successors, (input_ids,), (grid,) = learned([alike(30, 16, VOCAB)])
    row = successors.row(input_ids)
    data, table = pack(grid, row), successors.pack()
    for at in range(len(data)):
        with pytest.raises(StorageError):
            unpack(flipped(data, at), row)
    for at in range(0, len(table), 7):
        with pytest.raises(CorruptPayload):
            Successors.unpack(flipped(table, at))


def flipped(data: bytes, at: int, mask: int = 0x41) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_forged_payloads_are_errors_or_distributions(drawn: st.DataObject) -> None:
    """Change bytes after the header and correct the checksum: the decoder must hold.

    NUMBA_BOUNDSCHECK=1 (and a NUMBA_CACHE_DIR of its own) shows what would be read or written out
    of bounds.
    """
    successors, (input_ids,), (grid,) = LEARNED
    row = successors.row(input_ids)
    data = bytearray(pack(grid, row)[:-4])
    for _ in range(drawn.draw(st.integers(1, 4))):
        data[drawn.draw(st.integers(HEADER.size, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    try:
        found = unpack(bytes(data) + zlib.crc32(data).to_bytes(4, "little"), row)
    except StorageError:
        return
    assert 0 <= int(found.ids.min()) <= int(found.ids.max()) < VOCAB
    for ids in np.split(found.ids, np.cumsum(found.counts)[:-1]):
        assert len(set(ids.tolist())) == len(ids)


LEARNED = learned([alike(30, 16, VOCAB)])
