"""encode and decode: round trips, bounds against fp64, damage."""

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import CorruptPayload, FormatVersionError, InvalidRecord, Ranks, TopK, decode, encode
from storage.codec.codec import STEPS, kept, pack, quantised, restored
from storage.codec.frames import HEADER, Header, Limits, Planes, deflate, join, split_planes
from storage.topk import codec_kl
from tests.helpers.records import VOCAB, random_topk


@st.composite
def topks(draw: st.DrawFn) -> tuple[TopK, int]:
    vocab_size = draw(st.sampled_from([2, 3, 50, 257, 70_000]))
    positions = draw(st.integers(0, 12))
    count = st.integers(0, min(vocab_size, 300))
    counts = draw(st.lists(count, min_size=positions, max_size=positions) | count)
    return random_topk(positions, counts, vocab_size, draw(st.integers(0, 99))), vocab_size


@given(topks(), st.sampled_from([1 / 64, 1 / 16, 1 / 4, 1.0]), st.booleans())
@settings(deadline=None, max_examples=150)
def test_round_trip(made: tuple[TopK, int], step: float, ranked: bool) -> None:
    topk, vocab_size = made
    ranks = Ranks.learn([topk], vocab_size) if ranked else None
    found = decode(encode(topk, vocab_size=vocab_size, step=step, ranks=ranks), ranks)
    np.testing.assert_array_equal(found.counts, topk.counts)
    np.testing.assert_array_equal(found.ids, topk.ids)
    # step / 2 from the grid, and as much again from renormalising
    np.testing.assert_allclose(found.logprobs, topk.logprobs, atol=step + 1e-4)
    np.testing.assert_allclose(found.tail_logprob, topk.tail_logprob, atol=step + 1e-4)
    total = found.kept_mass() + np.exp(found.tail_logprob.astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_distortion_is_what_the_grid_allows() -> None:
    topk = random_topk(400, 64, 5000)
    found = decode(encode(topk, vocab_size=5000, step=1 / 16))
    p = np.exp(topk.logprobs.astype(np.float64)).reshape(400, 64)
    tail = np.exp(topk.tail_logprob.astype(np.float64))
    gap = (topk.logprobs - found.logprobs).astype(np.float64).reshape(400, 64)
    kl = (p * gap).sum(axis=1) + tail * (topk.tail_logprob - found.tail_logprob)
    assert 0 < kl.mean() < 2 * (1 / 16) ** 2 / 24  # half the variance of a uniform grid error
    assert kl.min() > -1e-6


def test_extreme_tails_survive() -> None:
    tails = np.array([-np.inf, -1e-7, -30, -700], np.float32)
    logprobs = np.array([0, -17, -1e-6, -1e-6], np.float32)
    topk = TopK(np.ones(4, np.uint16), np.arange(4, dtype=np.int32), logprobs, tails)
    found = decode(encode(topk, vocab_size=4))
    assert np.isneginf(found.tail_logprob[0])
    np.testing.assert_allclose(found.tail_logprob[1:], tails[1:], atol=0.04)
    np.testing.assert_allclose(found.logprobs, logprobs, atol=0.04)


def test_same_bytes_every_time() -> None:
    topk = random_topk(30, 16)
    assert encode(topk, vocab_size=VOCAB) == encode(topk, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logprobs": np.array([np.nan, -1], np.float32)},
            "position 0: id 1 has logprob nan, expected a finite number of nats",
        ),
        (
            {"logprobs": np.array([-0.5, np.inf], np.float32)},
            "position 0: id 2 has logprob inf, .* pass the result of log_softmax",
        ),
        ({"logprobs": np.array([2, 1], np.float32)}, "id 1 has logprob 2.0, expected .* at most 0"),
        ({"tail_logprob": np.array([0.5], np.float32)}, "tail_logprob is 0.5, expected"),
        ({"logprobs": np.array([-2, -1], np.float32)}, "not in order of descending"),
        (
            {"tail_logprob": np.array([np.nan], np.float32)},
            "position 0: tail_logprob is nan, expected nats of at most 0",
        ),
        ({"tail_logprob": np.zeros(2, np.float32)}, "counts has 1 positions, tail_logprob has 2"),
        ({"ids": np.array([1, VOCAB], np.int32)}, f"id {VOCAB} is outside"),
        ({"ids": np.array([7, 7], np.int32)}, "id 7 appears twice"),
        ({"ids": np.array([7], np.int32)}, "counts sum to 2 entries, found 1 ids"),
    ],
)
def test_what_is_no_distribution_is_refused(change: dict, message: str) -> None:
    whole = {
        "counts": np.array([2], np.uint16),
        "ids": np.array([1, 2], np.int32),
        "logprobs": np.array([-1, -2], np.float32),
        "tail_logprob": np.array([-1], np.float32),
    }
    with pytest.raises(InvalidRecord, match=message):
        encode(TopK(**{**whole, **change}), vocab_size=VOCAB)


def test_every_flipped_byte_is_detected() -> None:
    data = encode(random_topk(20, [3, 0, 8, 300] * 5), vocab_size=VOCAB)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x41
        with pytest.raises((CorruptPayload, FormatVersionError)):
            decode(bytes(damaged))


@given(st.integers(0, 400), st.binary(max_size=400))
@settings(deadline=None)
def test_cut_or_foreign_bytes_are_errors(length: int, foreign: bytes) -> None:
    data = encode(random_topk(20, 8), vocab_size=VOCAB)
    for bad in (data[: min(length, len(data) - 1)], foreign, data + b"\0"):
        with pytest.raises((CorruptPayload, FormatVersionError)):
            decode(bad)


def test_another_version_says_so() -> None:
    data = bytearray(encode(random_topk(3, 2), vocab_size=VOCAB))
    data[4] = 9
    with pytest.raises(FormatVersionError, match="version 9"):
        decode(bytes(data))


def test_a_payload_wants_its_own_ranks() -> None:
    topk, other = random_topk(20, 8), random_topk(20, 8, seed=1)
    ranks, foreign = Ranks.learn([topk], VOCAB), Ranks.learn([other], VOCAB)
    data = encode(topk, vocab_size=VOCAB, ranks=ranks)
    for wrong in (None, foreign):
        with pytest.raises(CorruptPayload, match="rank table"):
            decode(data, wrong)


def test_a_lying_header_allocates_nothing() -> None:
    data = encode(random_topk(1, 1), vocab_size=VOCAB)
    fields = list(HEADER.unpack(data[: HEADER.size]))
    import zlib

    fields[9:11] = [1 << 24, (1 << 24) * 65535]  # positions, entries: 10^12
    header = HEADER.pack(*fields[:-1], zlib.crc32(HEADER.pack(*fields)[:-4]))
    with pytest.raises(CorruptPayload):
        decode(header + data[HEADER.size :])


def forged(ids: list[int], steps: list[int], tails: list[int], count: int, vocab: int) -> bytes:
    """A version 1 payload of any planes, for positions of `count` entries."""
    groups = [split_planes(np.array([count]), 2)]
    groups += [split_planes(np.array(part, np.int64)) for part in (ids, steps, [], tails)]
    planes = Planes(0, *(len(group) for group in groups[1:]))
    header = Header(1, planes, 1 / 16, vocab, len(tails), len(ids), 0)
    return join(header.pack(), deflate(groups))


def test_what_would_decode_to_inf_is_refused() -> None:
    """Entries so far below the best one that their mass is 0, and no best one."""
    assert np.isfinite(decode(forged([1, 2], [0, 9], [0], 2, VOCAB)).logprobs).all()
    for tails in ([0], [1]):
        with pytest.raises(CorruptPayload, match="position 0: its best entry is below itself"):
            decode(forged([1, 2], [5_000_000, 0], tails, 2, VOCAB))


@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6),
    st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2),
)
@settings(deadline=None)
def test_whatever_decodes_is_finite(steps: list[int], tails: list[int]) -> None:
    steps[:2] = [0, 0]
    found = decode(forged(list(range(6)), steps, tails, 3, VOCAB))
    assert np.isfinite(found.logprobs).all()
    assert (found.logprobs <= 1e-3).all()
    assert not np.isnan(found.tail_logprob).any()
    assert (np.isneginf(found.tail_logprob) == (np.array(tails) == 0)).all()


def test_few_bytes_do_not_become_gigabytes() -> None:
    positions, count = 1 << 14, 1 << 13  # 2^27 entries
    ids = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(positions * count))
    planes = deflate([split_planes(np.array([count]), 2)])
    last = deflate([[b"\1" * positions]])
    header = Header(1, Planes(0, 1, 0, 0, 1), 1 / 16, 1 << 20, positions, positions * count, 0)
    data = join(header.pack(), [*planes, ids, *last])
    assert len(data) < 20_000
    tracemalloc.start()
    with pytest.raises(CorruptPayload, match=r"134217728 entries in .* bytes; expected at most"):
        decode(data)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_limits_are_those_of_the_row() -> None:
    data = encode(random_topk(20, 8), vocab_size=VOCAB)
    assert len(decode(data, limits=Limits(20, 8, VOCAB, 160))) == 20
    for wrong in ((19, 8, VOCAB), (20, 7, VOCAB), (20, 8, VOCAB + 1), (20, 8, VOCAB, 159)):
        with pytest.raises(CorruptPayload):
            decode(data, limits=Limits(*wrong))
    ragged = encode(random_topk(3, [9, 3, 0]), vocab_size=VOCAB)
    with pytest.raises(CorruptPayload, match="a position has 9 entries, the plan says k 8"):
        decode(ragged, limits=Limits(3, 8, VOCAB))


@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from([1 / 32, 1 / 16, 1 / 4]))
def test_codec_kl_is_the_divergence_of_k_plus_one_outcomes(seed: int, k: int, step: float) -> None:
    topk = random_topk(5, k, seed=seed)
    stored = decode(encode(topk, vocab_size=VOCAB, step=step))
    found = codec_kl(topk, stored)
    for t in range(5):
        p = np.exp([*topk.dense()[1][t], topk.tail_logprob[t]], dtype=np.float64)
        q = np.exp([*stored.dense()[1][t], stored.tail_logprob[t]], dtype=np.float64)
        p /= p.sum()
        assert found[t] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-3, abs=1e-7)
    assert (found > -1e-6).all()
    assert found.max() < step**2
    with pytest.raises(ValueError, match="different ids"):
        codec_kl(topk, random_topk(5, k, seed=seed + 1))


def test_each_codec_rounds_to_its_own_grid() -> None:
    topk = random_topk(20, VOCAB)
    for codec, step in STEPS.items():
        stays = kept(topk, step, codec)
        found = restored(quantised(topk, VOCAB, step, codec))
        assert (len(stays.ids) < len(topk.ids)) == (codec == "v3")
        assert 0 < codec_kl(stays, found).mean() < 4e-4
    with pytest.raises(InvalidRecord, match="a grid of roots goes with tables of version 3"):
        pack(quantised(topk, VOCAB, 0.01, "v3"), None)
