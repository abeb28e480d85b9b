"""Records for the tests of storage: random distributions of any shape."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from storage import Dump, Record, Samples, ShardWriter, TopK, create_dump
from storage.corpus_list import CorpusList
from storage.targets import positions_of

VOCAB = 300
TARGETS = {"version": 1}
FINGERPRINT = hashlib.sha256(b"corpus").hexdigest()


def random_topk(
    positions: int, counts: list[int] | int, vocab_size: int = VOCAB, seed: int = 0
) -> TopK:
    """True top-k of random full distributions; a position that keeps all has a tail of -inf."""
    rng = np.random.default_rng(seed)
    counts = np.broadcast_to(np.asarray(counts, np.uint16), positions).copy()
    ids, logprobs, tails = [], [], []
    for count in counts:
        logits = rng.normal(0, 3, vocab_size)
        full = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-full)
        ids.append(order[:count])
        logprobs.append(full[order[:count]])
        with np.errstate(divide="ignore"):
            tails.append(np.log(np.exp(full[order[count:]]).sum()))
    return TopK(
        counts,
        np.concatenate([np.zeros(0), *ids]).astype(np.int32),
        np.concatenate([np.zeros(0), *logprobs]).astype(np.float32),
        np.minimum(tails, 0).astype(np.float32).reshape(positions),
    )


def with_samples(topk: TopK, draws: int, vocab_size: int = VOCAB, seed: int = 0) -> TopK:
    """The same TopK with `draws` ids from outside the kept ones, some drawn often."""
    rng = np.random.default_rng(seed)
    drawn = np.full((len(topk), draws), -1)
    for row, kept in zip(drawn, np.split(topk.ids, np.cumsum(topk.counts)[:-1]), strict=False):
        left = np.setdiff1d(np.arange(vocab_size), kept)
        if len(left):
            row[:] = left[(rng.random(draws) ** 3 * len(left)).astype(int)]
    return replace(topk, samples=Samples.from_drawn(drawn))


def some_samples(draws: int = 12, positions: int = 30, k: int = 5) -> Samples:
    topk = with_samples(random_topk(positions, k), draws, seed=3)
    assert topk.samples is not None
    return topk.samples


@st.composite
def sampled_topks(draw: st.DrawFn) -> tuple[TopK, int]:
    """A TopK with samples, and the size of its vocabulary."""
    vocab_size = draw(st.sampled_from([2, 3, 50, 257, 1 << 20]))
    small = min(vocab_size, 300)
    positions = draw(st.integers(0, 12))
    count = st.integers(0, small)
    counts = draw(st.lists(count, min_size=positions, max_size=positions) | count)
    topk = random_topk(positions, counts, small, draw(st.integers(0, 99)))
    made = with_samples(topk, draw(st.sampled_from([1, 2, 50, 300])), small, draw(st.integers(0)))
    stretch = (vocab_size - 1) // max(small - 1, 1)  # spread the ids over a large vocabulary
    assert made.samples is not None
    samples = replace(made.samples, ids=made.samples.ids * np.int32(stretch))
    return replace(made, ids=made.ids * np.int32(stretch), samples=samples), vocab_size


def random_record(
    number: int,
    tokens: int = 20,
    k: int = 8,
    chunk: int = 0,
    samples: int = 0,
    targets: np.ndarray | None = None,
) -> Record:
    rng = np.random.default_rng(number)
    ids = rng.integers(0, VOCAB, tokens).astype(np.int32)
    topk = random_topk(len(positions_of(targets, tokens)), k, seed=number)
    topk = with_samples(topk, samples, seed=number) if samples else topk
    return Record(f"doc-{number}", chunk, ids, topk, targets)


def masked_record(number: int, tokens: int = 20, k: int = 8, samples: int = 0) -> Record:
    """As random_record, with distributions at some of the positions."""
    return random_record(number, tokens, k, samples=samples, targets=random_mask(tokens, number))


def random_mask(tokens: int = 20, seed: int = 0, share: float = 0.4) -> np.ndarray:
    """bool [tokens]: a random share of the tokens, and always the last one; never the first."""
    mask = np.random.default_rng(seed).random(tokens) < share
    mask[0], mask[-1] = False, True
    return mask


def plan(**changes: object) -> dict:
    """A plan whose grid `assert_same` allows for: nats or, in version 3, units of √p."""
    step = 1 / 2048 if changes.get("codec") == "v3" else 0.0625
    return {"vocab_size": VOCAB, "k": 8, "step": step, "partitions": 1, **changes}


def make_dump(
    path: Path, shards: int = 2, rows: int = 5, partitions: int = 1, **changes: object
) -> Dump:
    """A finished dump of `shards` shards of `rows` rows in each partition.

    With `targets=TARGETS` its rows are those of `masked_record`.
    """
    dump = create_dump(path, plan(partitions=partitions, **changes))
    k, samples = dump.plan["k"], dump.plan.get("samples", 0)
    row = masked_record if "targets" in dump.plan else random_record
    number = 0
    for partition in dump.partitions:
        for _ in range(shards):
            writer = ShardWriter(partition)
            for _ in range(rows):
                writer.write(row(number, k=k, samples=samples))
                number += 1
            writer.commit(cursor={"document": number})
        partition.finish({})
    dump.finish()
    return dump


def some_list(files: int) -> CorpusList:
    """The files of a corpus with FINGERPRINT."""
    digests = [hashlib.sha256(bytes([number % 256])).hexdigest() for number in range(files)]
    return CorpusList(
        fingerprint=FINGERPRINT,
        paths=[f"part-{number:05d}-of-{files:05d}.jsonl.zst" for number in range(files)],
        sizes=[200_000_000 + number for number in range(files)],
        sha256=digests,
        documents=[50_000 + number for number in range(files)],
        samples=[digest[:16] for digest in digests],
        ids_differ=True,
        first={},
    )


def flip_byte(file: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut_short(file: Path) -> None:
    """Drop the last 100 bytes of a file."""
    file.write_bytes(file.read_bytes()[:-100])


def assert_same(left: Record, right: Record, tolerance: float = 0.0626) -> None:
    assert (left.doc_id, left.chunk) == (right.doc_id, right.chunk)
    np.testing.assert_array_equal(left.input_ids, right.input_ids)
    assert (left.targets is None) == (right.targets is None)
    np.testing.assert_array_equal(left.positions, right.positions)
    np.testing.assert_array_equal(left.topk.counts, right.topk.counts)
    mine, others = by_id(left.topk), by_id(right.topk)
    np.testing.assert_array_equal(left.topk.ids[mine], right.topk.ids[others])
    np.testing.assert_allclose(
        left.topk.logprobs[mine], right.topk.logprobs[others], atol=tolerance
    )
    np.testing.assert_allclose(left.topk.tail_logprob, right.topk.tail_logprob, atol=tolerance)


def by_id(topk: TopK) -> np.ndarray:
    """Order of the entries by position and id; version 2 keeps no order of equal entries."""
    return np.lexsort((topk.ids, np.repeat(np.arange(len(topk)), topk.counts)))
