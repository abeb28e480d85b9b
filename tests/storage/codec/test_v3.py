"""Version 3: round trips through tables, damage, and what it refuses."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import CorruptPayload, FormatVersionError, InvalidRecord, StorageError, TopK
from storage.codec.codec import STEPS, decode, encode, pack, unpack
from storage.codec.frames import HEADER, Limits
from storage.codec.root_grid import MIN_STEP, RootGrid, dequantise, quantise
from storage.codec.v3_kernels import STREAMS
from storage.codec.v3_learning import learn
from storage.codec.v3_tables import Row, Tables
from storage.topk import codec_kl
from tests.helpers.records import VOCAB, random_mask, random_topk, with_samples

STEP = STEPS["v3"]


def learnt(
    topks: list[TopK],
    vocab_size: int = VOCAB,
    step: float = STEP,
    seed: int = 0,
    masks: list[np.ndarray] | None = None,
) -> tuple[Tables, list[np.ndarray], list[RootGrid]]:
    """Tables learnt from these distributions, over random tokens from a small range."""
    rng = np.random.default_rng(seed)
    lengths = [len(topk) + 1 for topk in topks] if masks is None else map(len, masks)
    inputs = [rng.integers(0, min(9, vocab_size), n).astype(np.int32) for n in lengths]
    grids = [quantise(topk, vocab_size, step) for topk in topks]
    return learn(list(zip(inputs, grids, strict=True)), vocab_size, masks), inputs, grids


def alike(positions: int, count: int, vocab_size: int = VOCAB, seed: int = 0) -> TopK:
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
    topk = TopK(topk.counts, ids.astype(np.int32), topk.logprobs, topk.tail_logprob)
    if vocab_size == 50 and draw(st.booleans()):
        topk = with_samples(topk, 2, vocab_size)
    return topk, vocab_size


@given(shapes(), st.sampled_from([MIN_STEP, 1e-3, STEP, 1 / 30, 0.3, 1.0]))
@settings(deadline=None, max_examples=60)
def test_round_trip(made: tuple[TopK, int], step: float) -> None:
    topk, vocab_size = made
    tables, (input_ids,), (grid,) = learnt([topk], vocab_size, step)
    row = Tables.unpack(tables.pack(), vocab_size).row(input_ids)
    data = encode(topk, vocab_size=vocab_size, step=step, ranks=row)
    assert data[4] == 3
    assert unpack(data, row).same(grid)
    found, expected = decode(data, row), dequantise(grid)
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    np.testing.assert_array_equal(found.tail_logprob, expected.tail_logprob)
    total = found.kept_mass() + np.exp(found.tail_logprob.astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=1e-5)


@given(shapes())
@settings(deadline=None, max_examples=30)
def test_tables_of_other_text_hold_any_grid(made: tuple[TopK, int]) -> None:
    """No symbol has a probability of 0."""
    topk, vocab_size = made
    tables, _, _ = learnt([random_topk(3, 2, min(vocab_size, 50))], vocab_size)
    row = tables.row(np.zeros(len(topk) + 1, np.int32))
    grid = quantise(topk, vocab_size, STEP)
    assert unpack(pack(grid, row), row).same(grid)


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(0, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_round_trip_of_any_mask(mask: list[bool], count: int, seed: int) -> None:
    targets = np.array(mask)
    topk = random_topk(int(targets[1:].sum()), count, seed=seed)
    tables, (input_ids,), (grid,) = learnt([topk], seed=seed, masks=[targets])
    row = Tables.unpack(tables.pack()).row(input_ids, targets)
    assert unpack(pack(grid, row), row).same(grid)


def test_a_mask_of_all_tokens_costs_nothing() -> None:
    """The coded entries are those without a mask; only the checksums differ."""
    topks = [alike(60, 16)]
    tables, (input_ids,), (grid,) = learnt(topks)
    masked, _, _ = learnt(topks, masks=[np.ones(61, bool)])
    assert masked.pack() == tables.pack()
    plain = pack(grid, tables.row(input_ids))
    data = pack(grid, tables.row(input_ids, np.ones(61, bool)))
    assert data[: HEADER.size - 8] == plain[: HEADER.size - 8]
    assert data[HEADER.size : -4] == plain[HEADER.size : -4]


def test_a_payload_wants_its_own_mask() -> None:
    """Another one with as many positions, none, and one of another length."""
    targets = random_mask(60)
    other = np.concatenate([targets[:1], np.roll(targets[1:], 1)])
    tables, (input_ids,), (grid,) = learnt([alike(int(targets[1:].sum()), 16)], masks=[targets])
    data = pack(grid, tables.row(input_ids, targets))
    first = np.concatenate([~targets[:1], targets[1:]])  # its mark has no meaning
    assert unpack(data, tables.row(input_ids, first)).same(grid)
    for wrong in (other, None):
        with pytest.raises(CorruptPayload, match=r"pass tables.row\(input_ids, targets\)"):
            unpack(data, tables.row(input_ids, wrong))
    with pytest.raises(CorruptPayload, match="a mask of 59 tokens for 60 input ids"):
        tables.row(input_ids, targets[1:])


@pytest.mark.parametrize("counts", [[65_535, 0, 1], [65_536 - 1, 65_535, 65_535]])
def test_all_of_a_vocabulary_and_none(counts: list[int]) -> None:
    topk = random_topk(3, counts, 65_536)
    tables, (input_ids,), (grid,) = learnt([topk], 65_536, MIN_STEP)
    assert int(grid.counts.max()) > 50_000
    row = tables.row(input_ids)
    assert unpack(pack(grid, row), row).same(grid)


def test_nothing_kept_and_everything_certain() -> None:
    tails = TopK(np.zeros(4, np.uint16), np.zeros(0, np.int32), np.zeros(0, np.float32),
                 np.zeros(4, np.float32))  # fmt: skip
    certain = TopK.from_dense(np.arange(4)[:, None], np.zeros((4, 1)), np.full(4, -np.inf))
    for topk in (tails, certain):
        tables, (input_ids,), (grid,) = learnt([topk])
        row = tables.row(input_ids)
        found = decode(pack(grid, row), row)
        np.testing.assert_array_equal(found.ids, topk.ids)
        np.testing.assert_allclose(found.tail_logprob, topk.tail_logprob, atol=1e-7)
        np.testing.assert_allclose(found.logprobs, topk.logprobs, atol=1e-7)


def test_rows_decode_alone_and_in_any_order() -> None:
    tables, inputs, grids = learnt([alike(40, 16, seed=seed) for seed in range(6)])
    rows = [tables.row(input_ids) for input_ids in inputs]
    payloads = [pack(grid, row) for grid, row in zip(grids, rows, strict=True)]
    for at in (5, 0, 3, 3):
        assert unpack(payloads[at], rows[at]).same(grids[at])


def test_equal_entries_are_the_only_ones_to_change_places() -> None:
    tables, (input_ids,), (grid,) = learnt([alike(50, 32)], step=1 / 20)
    row = tables.row(input_ids)
    before = grid.ids.copy()
    found = unpack(pack(grid, row), row)
    np.testing.assert_array_equal(grid.ids, before)  # writing leaves its argument alone
    np.testing.assert_array_equal(found.roots, grid.roots)
    assert (found.ids != grid.ids).any()
    assert found.same(grid)
    assert pack(found, row) == pack(grid, row)  # whatever their order, the bytes are the same


def test_the_cost_of_the_grid_is_the_whole_cost() -> None:
    topk = alike(50, 60)
    tables, (input_ids,), (grid,) = learnt([topk])
    row = tables.row(input_ids)
    kl = codec_kl(replace(topk, ids=topk.ids), dequantise(grid))
    assert 0 < kl.mean() < 1e-4
    assert unpack(pack(grid, row), row).same(grid)


def test_a_payload_wants_its_own_tables_and_its_own_row() -> None:
    topks = [alike(40, 16, seed=seed) for seed in range(2)]
    tables, inputs, grids = learnt(topks)
    data = pack(grids[0], tables.row(inputs[0]))
    other, _, _ = learnt(topks[1:])
    for wrong in (None, tables.ranks, tables.row(inputs[1]), other.row(inputs[0])):
        with pytest.raises(CorruptPayload, match=r"the tables of its own dump"):
            unpack(data, wrong)
    with pytest.raises(InvalidRecord, match="40 positions, the row has 39"):
        pack(grids[0], tables.row(inputs[0][:-1]))
    with pytest.raises(InvalidRecord, match="the tables have 300 ids, the vocabulary has 299"):
        pack(replace(grids[0], vocab_size=299), tables.row(inputs[0]))


def test_the_row_limits_what_a_payload_claims() -> None:
    tables, (input_ids,), (grid,) = learnt([alike(30, 16)])
    row, data = tables.row(input_ids), pack(grid, tables.row(input_ids))
    entries = len(grid.ids)
    assert unpack(data, row, Limits(30, 16, VOCAB, entries)).same(grid)
    for limits in (
        Limits(29, 16, VOCAB), Limits(30, 15, VOCAB), Limits(30, 16, VOCAB + 1),
        Limits(30, 16, VOCAB, entries - 1),
    ):  # fmt: skip
        with pytest.raises(CorruptPayload):
            unpack(data, row, limits)


def test_every_flipped_byte_is_detected() -> None:
    tables, (input_ids,), (grid,) = learnt([alike(30, 16)])
    row = tables.row(input_ids)
    data = pack(grid, row)
    for at in range(len(data)):
        for mask in (0x41, 0x80):
            with pytest.raises(StorageError):
                unpack(flipped(data, at, mask), row)


def flipped(data: bytes, at: int, mask: int = 0x41) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def with_checksums(data: bytes) -> bytes:
    """The payload with its checksums right."""
    head = data[: HEADER.size - 4]
    head += struct.pack("<I", zlib.crc32(head))
    return (
        head + data[HEADER.size : -4] + struct.pack("<I", zlib.crc32(data[52:-4], zlib.crc32(head)))
    )


def holds(data: bytes, row: Row) -> bool:
    """Whether a forged payload decodes: then what it holds is a distribution over its ids."""
    try:
        grid = unpack(data, row)
    except StorageError:
        return False
    assert isinstance(grid, RootGrid)
    assert len(grid.ids) == int(grid.counts.sum(dtype=np.int64))
    assert 0 <= int(grid.ids.min(initial=0)) <= int(grid.ids.max(initial=0)) < VOCAB
    for ids in np.split(grid.ids, np.cumsum(grid.counts)[:-1]):
        assert len(set(ids.tolist())) == len(ids)
    found = dequantise(grid)
    assert np.isfinite(found.logprobs).all()
    assert not np.isnan(found.tail_logprob).any()
    return True


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_forged_payloads_are_errors_or_distributions(drawn: st.DataObject) -> None:
    """Change bytes after the header and correct the checksum: the decoder must hold.

    NUMBA_BOUNDSCHECK=1 (and a NUMBA_CACHE_DIR of its own) shows what would be read or written out
    of bounds.
    """
    tables, (input_ids,), (grid,) = LEARNT
    row = tables.row(input_ids)
    data = bytearray(pack(grid, row))
    for _ in range(drawn.draw(st.integers(1, 4))):
        data[drawn.draw(st.integers(HEADER.size, len(data) - 5))] = drawn.draw(st.integers(0, 255))
    holds(with_checksums(bytes(data)), row)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 4}, FormatVersionError, "payload of version 4.*update mol-distill"),
        ({"step": 1.5}, CorruptPayload, "impossible header"),
        ({"step": 1e-6}, CorruptPayload, "impossible header"),
        (
            {"entries": 479},
            CorruptPayload,
            "another number of entries|more entries|ends? too early",
        ),
        ({"entries": 1 << 40}, CorruptPayload, "impossible header"),
        ({"positions": 31}, CorruptPayload, "needs the tables of its own dump"),
    ],
)
def test_forged_headers(change: dict, error: type, message: str) -> None:
    tables, (input_ids,), (grid,) = LEARNT
    row = tables.row(input_ids)
    names = ("magic", "version", "a", "b", "c", "d", "e", "step", "vocab", "positions", "entries",
             "needs", "checksum")  # fmt: skip
    data = pack(grid, row)
    fields = dict(zip(names, HEADER.unpack(data[: HEADER.size]), strict=True)) | change
    forged = with_checksums(HEADER.pack(*fields.values()) + data[HEADER.size :])
    with pytest.raises(error, match=message):
        unpack(forged, row)


def test_words_that_are_too_few() -> None:
    tables, (input_ids,), (grid,) = LEARNT
    row = tables.row(input_ids)
    data = pack(grid, row)
    for words in (0, 1, 2 * STREAMS, 2 * STREAMS + 3, 200):
        cut = data[: 52 + 2 * words]
        cut = cut[:48] + struct.pack("<I", 2 * words + 4) + cut[52:] + bytes(4)
        with pytest.raises(CorruptPayload):
            unpack(with_checksums(cut), row)
    longer = data[:48] + struct.pack("<I", len(data) - 50) + data[52:-4] + bytes(6)
    with pytest.raises(CorruptPayload, match="data follows the last coded entry"):
        unpack(with_checksums(longer), row)


def test_golden_payloads_are_read_for_ever() -> None:
    """golden/payloads_v3.npz holds tables and payloads as the first release wrote them."""
    golden = np.load(Path(__file__).parents[1] / "golden" / "payloads_v3.npz")
    tables = Tables.unpack(golden["tables"].tobytes(), VOCAB)
    for name, mask in (("", None), ("masked_", golden["targets"])):
        row = tables.row(golden[f"{name}input_ids"], mask)
        data = golden[f"{name}payload"].tobytes()
        found = unpack(data, row)
        assert isinstance(found, RootGrid)
        for field in ("counts", "ids", "roots", "tails"):
            np.testing.assert_array_equal(getattr(found, field), golden[name + field])
        assert pack(found, row) == data  # it also writes as it did


MANY = pytest.mark.parametrize("changes", [1000, pytest.param(100_000, marks=pytest.mark.long)])


def damaged(data: bytes, rng: np.random.Generator, start: int = 0, end: int = 0) -> bytes:
    """One to four bytes changed at random, or now and then the end cut off."""
    if start == end == 0 and rng.random() < 0.05:
        return data[: int(rng.integers(len(data)))]
    changed = bytearray(data)
    for at in rng.integers(start, len(data) - end, int(rng.integers(1, 5))):
        changed[at] ^= int(rng.integers(1, 256))
    return bytes(changed)


@MANY
def test_damage_at_random_is_refused(changes: int) -> None:
    """Of payloads and of tables; what comes back equal was changed twice at one place."""
    tables, (input_ids,), (grid,) = LEARNT
    row = tables.row(input_ids)
    data, packed, rng = pack(grid, row), tables.pack(), np.random.default_rng(7)
    for _ in range(changes):
        bad = damaged(data, rng)
        if bad != data:
            with pytest.raises(StorageError):
                unpack(bad, row)
        bad = damaged(packed, rng)
        if bad != packed:
            with pytest.raises(StorageError):
                Tables.unpack(bad)


@MANY
def test_damage_with_right_checksums_is_an_error_or_a_distribution(changes: int) -> None:
    tables, (input_ids,), (grid,) = LEARNT
    row = tables.row(input_ids)
    data, packed, rng = pack(grid, row), tables.pack(), np.random.default_rng(8)
    decoded = 0
    for number in range(changes):
        decoded += holds(with_checksums(damaged(data, rng, HEADER.size, 4)), row)
        if number % 100 == 0:
            body = damaged(packed[:-4], rng, 4)
            try:
                found = Tables.unpack(body + struct.pack("<I", zlib.crc32(body)))
            except StorageError:
                continue
            assert found.row(input_ids).tables is found
            holds(with_needs(data, found.row(input_ids).checksum), found.row(input_ids))
    assert decoded < changes / 50


def with_needs(data: bytes, needs: int) -> bytes:
    """The payload, as if other tables had written it."""
    return with_checksums(data[: HEADER.size - 8] + struct.pack("<I", needs) + data[40:])


LEARNT = learnt([alike(30, 16)])
