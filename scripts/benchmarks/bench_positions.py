"""What a random share of the positions costs the student: noise of its gradient, at equal bytes.

    python scripts/benchmarks/bench_positions.py MODEL CORPUS

The student is MODEL with noise on its weights, the teacher MODEL itself. The gradient is that of
forward KL to what a dump stores, as training computes it, over `--rows` sequences of `--length`
tokens of CORPUS, in all parameters; the truth is that of the full-vocabulary KL at all positions.
What a dump draws, the positions or samples, is drawn anew for each of `--draws` gradients:

    bias   distance of the mean gradient to the truth, without the noise that the mean still has
    noise  distance of one gradient to the mean one: root of the summed variances

both relative to the length of the true gradient. Noise falls with the root of the targets in a
step, bias stays. The last two lines draw the sequences of a step too, from all that were read: what
noise a step has in any case, and what it has if the bytes that a share saves buy more sequences.

Bytes are those of payloads of version 1 and of the mask's bit, per token, on the sequences that
were read (of samples on some of them). The smaller k and the number of samples are those that take
the bytes of top-k at `--share` of the positions.
"""

import argparse
import copy
import os

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.data.packing import pack_row, with_targets
from pipeline.models.directory import ModelFolder
from pipeline.positions import Share
from pipeline.teacher.sampling import Sampling, draw, places
from pipeline.training.forward import add_distill_forward
from storage import Record, Samples
from storage.codec import samples as sampled
from storage.codec.codec import pack
from storage.codec.grid import dequantise, quantise
from storage.codec.v1 import Ranks
from storage.topk import TopK

STEP, MASK_BYTES = 1 / 16, 1 / 8
SAMPLED_ROWS = 16  # on which the bytes of samples are counted


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: np.ndarray) -> Tensor:
    """[tokens - 1, V]"""
    inputs = torch.from_numpy(ids[None].astype(np.int64))
    logits: Tensor = model(inputs, use_cache=False).logits[0, :-1]
    return logits


# ---- what a dump stores of a sequence


def top_k(logits: Tensor, k: int) -> TopK:
    log_p = logits.log_softmax(1)
    best, ids = log_p.topk(k)
    return TopK.from_dense(ids, best, log_p.scatter(1, ids, -torch.inf).logsumexp(1))


def cut(record: Record, k: int) -> Record:
    """The best k; the mass of the others goes to the tail."""
    ids, logprobs = record.topk.dense()
    rest = np.logaddexp.reduce(logprobs[:, k:].astype(np.float64), axis=1)
    tail = np.logaddexp(record.topk.tail_logprob, rest)
    return replace(record, topk=TopK.from_dense(ids[:, :k], logprobs[:, :k], tail))


def shared(record: Record, share: float, seed: int) -> Record:
    """A random share of the positions."""
    targets = Share(share, seed).draw(record.doc_id, 0, None, len(record.input_ids))
    found = replace(record, targets=targets)
    ids, logprobs = record.topk.dense()
    at = found.positions
    return replace(found, topk=TopK.from_dense(ids[at], logprobs[at], record.topk.tail_logprob[at]))


def drawn(record: Record, logits: Tensor, number: int, seed: int) -> Record:
    """Samples alone, as stage one draws them."""
    total = logits.logsumexp(1)
    found = draw(logits.clone(), places(Sampling(number, seed), total, total), total)
    nothing = torch.zeros(len(logits), 0)
    topk = TopK.from_dense(nothing, nothing, torch.zeros(len(logits)), found)
    return replace(record, topk=topk)


def rounded(records: list[Record], vocab: int) -> list[Record]:
    """As they are read from a dump."""
    grids = (quantise(record.topk, vocab, STEP) for record in records)
    return [replace(r, topk=dequantise(grid)) for r, grid in zip(records, grids, strict=True)]


def bytes_of(records: list[Record], vocab: int) -> float:
    """Bytes per token of the payloads, with the mask's bit where there is one."""
    grids = [quantise(record.topk, vocab, STEP).narrow() for record in records]
    ranks = Ranks.learn(iter(grids), vocab)
    tokens = sum(len(record.input_ids) for record in records)
    size = sum(len(pack(grid, ranks)) for grid in grids) / tokens
    return size if records[0].targets is None else size + MASK_BYTES


def sample_bytes(records: list[Record], vocab: int) -> float:
    samples = [record.topk.samples for record in records]
    size = sum(len(sampled.pack(one, vocab)) for one in samples if isinstance(one, Samples))
    return size / sum(len(record.input_ids) for record in records)


def nearest(values: range, size: Callable[[int], float], wanted: float) -> int:
    """The value whose size is nearest to the wanted one; sizes grow."""
    low, high = values[0], values[-1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle)
    return min((low, high), key=lambda value: abs(size(value) - wanted))


# ---- gradients


def noisy(teacher: PreTrainedModel, noise: float) -> PreTrainedModel:
    """The teacher with noise on its weight matrices, relative to their standard deviation."""
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            if weight.dim() > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return student


def flat_gradient(student: PreTrainedModel) -> Tensor:
    parts = [parameter.grad.reshape(-1) for parameter in student.parameters()]
    student.zero_grad()
    return torch.cat(parts)


def gradient(student: PreTrainedModel, records: list[Record]) -> Tensor:
    """[parameters] of the mean KL over the targets."""
    row = pack_row([], records)
    number = len(row["targets"]["rows"])
    weights = torch.full((number,), 1 / number)
    student(**with_targets(row, row_weights=weights))["loss"].backward()
    return flat_gradient(student)


def true_gradient(student: PreTrainedModel, records: list[Record], full: list[Tensor]) -> Tensor:
    """[parameters] of the mean KL over the full vocabulary at all positions."""
    positions = sum(map(len, full))
    for record, logits in zip(records, full, strict=True):
        inputs = torch.from_numpy(record.input_ids[None].astype(np.int64))
        log_q = student(input_ids=inputs, use_cache=False).logits[0, :-1].log_softmax(1)
        (-(logits.softmax(1) * log_q).sum() / positions).backward()
    return flat_gradient(student)


@dataclass
class Mean:
    """Mean of gradients, and the sum of their squared distances to it."""

    number: int = 0
    mean: Tensor | float = 0.0
    squares: float = 0.0

    def add(self, value: Tensor) -> None:
        self.number += 1
        gap = value - self.mean
        self.mean = self.mean + gap / self.number
        self.squares += float(gap @ (value - self.mean))

    def against(self, truth: Tensor) -> tuple[float, float]:
        """(bias, noise) relative to the length of the truth."""
        length = float(truth @ truth)
        variance = self.squares / max(self.number - 1, 1)
        off = self.mean - truth
        bias = max(float(off @ off) - variance / self.number, 0.0)
        return (bias / length) ** 0.5, (variance / length) ** 0.5


def mean_of(
    student: PreTrainedModel, records_of: Callable[[int], list[Record]], times: int
) -> Mean:
    mean = Mean()
    for seed in range(times):
        mean.add(gradient(student, records_of(seed)))
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("corpus")
    parser.add_argument("--k", type=int, default=64, help="entries of a distribution")
    parser.add_argument("--share", type=float, default=0.2, help="of the positions")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--read", type=int, default=400, help="sequences that are read")
    parser.add_argument("--draws", type=int, default=50, help="gradients of each kind of draw")
    parser.add_argument("--noise", type=float, default=0.2, help="on the student's weights")
    given = parser.parse_args()
    folder = ModelFolder.find(given.model)
    vocab, teacher = folder.vocab_size, folder.load("float32").eval()
    corpus = Corpus(CorpusConfig(given.corpus), folder.tokenizer, given.length)
    whole = (one for one in corpus.sequences() if len(one.input_ids) == given.length)
    every = []
    for one in islice(whole, given.read):
        stored = top_k(logits_of(teacher, one.input_ids), given.k)
        every.append(Record(f"{one.doc_id} {one.chunk}", 0, one.input_ids, stored))
    every = rounded(every, vocab)
    step = [every[at] for at in np.linspace(0, len(every) - 1, given.rows, dtype=int)]
    full = [logits_of(teacher, record.input_ids) for record in step]
    some = [every[at] for at in np.linspace(0, len(every) - 1, SAMPLED_ROWS, dtype=int)]
    some_logits = [logits_of(teacher, record.input_ids) for record in some]

    def top_k_bytes(k: int) -> float:
        return bytes_of([cut(record, k) for record in every], vocab)

    def bytes_of_samples(number: int) -> float:
        found = [drawn(r, z, number, 0) for r, z in zip(some, some_logits, strict=True)]
        return sample_bytes(found, vocab)

    wanted = bytes_of([shared(record, given.share, 0) for record in every], vocab)
    small = nearest(range(1, given.k), top_k_bytes, wanted)
    number = nearest(range(1, 200), bytes_of_samples, wanted)

    def chosen(seed: int, rows: int) -> list[Record]:
        places = np.random.default_rng(seed).choice(len(every), rows, replace=False)
        return [every[at] for at in places]

    share, rows = given.share, given.rows
    more = round(rows / share)
    lines: list[tuple[str, float, Callable[[int], list[Record]], int]] = [
        (f"k {given.k}, all positions", top_k_bytes(given.k), lambda _: step, 1),
        (f"k {given.k}, {share:g} of the positions", wanted,
         lambda seed: [shared(r, share, seed) for r in step], given.draws),
        (f"k {small}, all positions", top_k_bytes(small),
         lambda _: rounded([cut(r, small) for r in step], vocab), 1),
        (f"{number} samples, all positions", bytes_of_samples(number),
         lambda seed: [drawn(r, z, number, seed) for r, z in zip(step, full, strict=True)],
         given.draws),
        (f"any {rows} sequences, all positions", top_k_bytes(given.k),
         lambda seed: chosen(seed, rows), given.draws),
        (f"any {more} sequences, {share:g} of the positions", wanted,
         lambda seed: [shared(r, share, seed) for r in chosen(seed, more)], given.draws),
    ]  # fmt: skip
    student = noisy(teacher, given.noise)
    truth = true_gradient(student, step, full)
    add_distill_forward(student, "forward")
    print(f"{given}\n{sum(map(len, full)):,} positions in a step of {rows} sequences")
    print(f"{'':<40}{'bytes/token':>12}{'bias':>8}{'noise':>8}")
    for name, size, records_of, times in lines:
        bias, noise = mean_of(student, records_of, times).against(truth)
        shown = "" if name.startswith("any") else f"{bias:.3f}"
        print(f"{name:<40}{size:>12.1f}{shown:>8}{noise:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
