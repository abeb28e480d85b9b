"""What a cut-off costs the student: bytes per token against the error of its gradient.

    python scripts/benchmarks/bench_cutoff.py MODEL DUMP --rows 16

Reads rows of a dump of MODEL and runs the model on them again for its full distributions. The
students are the model with noise on its weights. The gradient is that of forward KL over the rows
in all parameters; the truth is the full-vocabulary KL. Bytes are those of version 2 in memory, with
tables, over `--tokens` of the dump.

Sampled targets are drawn again from the full distributions. Their gradient has noise, which falls
with the tokens of a step, while the error of a cut-off stays. So the error of the mean over
`--draws` draws is shown beside that of one draw. Bytes of samples are counted on the rows of the
gradients, bytes of kept entries as above.
"""

import argparse
import copy
import os

os.environ["OMP_NUM_THREADS"] = "1"

import itertools
from pathlib import Path

import numpy as np
import torch

from pipeline.losses import sparse_divergence
from pipeline.models.directory import ModelFolder
from pipeline.teacher.sampling import Sampling, draw, places
from storage import LogitDataset, Record, Samples, Successors
from storage.codec import samples as sampled
from storage.codec.codec import pack
from storage.codec.grid import dequantise, quantise
from storage.topk import TopK, codec_kl

# (k, min_prob, top_p)
CUTS = [
    (64, 0.0, 1.0), (64, 1e-4, 1.0), (64, 3e-4, 1.0), (64, 1e-3, 1.0), (64, 3e-3, 1.0),
    (64, 1e-2, 1.0), (64, 0.0, 0.99), (64, 0.0, 0.95), (64, 0.0, 0.9), (32, 0.0, 1.0),
    (16, 0.0, 1.0), (8, 0.0, 1.0),
]  # fmt: skip


# (k, samples)
SAMPLED = [(0, 50), (64, 32)]


def cut(topk: TopK, k: int, min_prob: float, top_p: float) -> TopK:
    if k < int(topk.counts.max(initial=0)):
        ids, logprobs = topk.dense()
        rest = np.logaddexp.reduce(logprobs[:, k:].astype(np.float64), axis=1)
        topk = TopK.from_dense(ids[:, :k], logprobs[:, :k], np.logaddexp(topk.tail_logprob, rest))
    return topk.cut(min_prob, top_p)


def bytes_per_token(
    rows: list[Record], how: tuple[int, float, float], vocab: int
) -> tuple[float, float]:
    """(bytes per token of payloads and tables, mean entries) of rows that are cut by `how`."""
    grids = [(r.input_ids, quantise(cut(r.topk, *how), vocab, 1 / 16).narrow()) for r in rows]
    tables = Successors.learn(grids, vocab)
    size = len(tables.pack()) + sum(len(pack(grid, tables.row(ids))) for ids, grid in grids)
    entries = sum(len(grid.ids) for _, grid in grids) / sum(len(g.counts) for _, g in grids)
    return size / sum(len(ids) for ids, _ in grids), entries


def drawn_targets(
    full: torch.Tensor, k: int, draws: int, seeds: range
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """(targets [T, V] of one draw, mean targets of all, mean number of ids, bytes per token)."""
    best, ids = full.topk(k)
    outside = full.scatter(1, ids, -torch.inf)
    rest = outside.logsumexp(-1)
    kept = torch.zeros_like(full).scatter(1, ids, best.exp())
    single, mean = kept.clone(), kept.clone()
    number, size = 0.0, 0.0
    for seed in seeds:
        at = places(Sampling(draws, seed), rest, full.logsumexp(-1))
        drawn = draw(outside.clone(), at, rest)
        share = (rest.exp() / draws)[:, None].expand(drawn.shape)
        mean.scatter_add_(1, drawn, share / len(seeds))
        if seed == seeds[0]:
            single.scatter_add_(1, drawn, share)
            samples = Samples.from_drawn(drawn)
            number = len(samples.ids) / len(drawn)
            size = len(sampled.pack(samples, full.shape[1])) / len(drawn)
    return single, mean, number, size


def gradient(student: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
    return torch.cat([grad.reshape(-1) for grad in grads]).double()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("dump", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="rows for the gradients")
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens to count bytes on")
    parser.add_argument("--draws", type=int, default=40, help="draws that the mean is taken over")
    parser.add_argument(
        "--noise",
        default="0.05,0.2,0.5",
        help="noise on the weights, relative to the standard deviation of each weight matrix",
    )
    given = parser.parse_args()
    dataset = LogitDataset(given.dump, partial=True, samples=False)
    vocab, rows, tokens = int(dataset.plan["vocab_size"]), [], 0
    for number in itertools.count():
        rows.append(dataset[number])
        tokens += len(rows[-1].input_ids)
        if tokens >= given.tokens or number + 1 == len(dataset):
            break
    sizes = [bytes_per_token(rows, how, vocab) for how in CUTS]
    # Rows evenly spread over those that were read, and the first 256 tokens of each.
    chosen = [rows[i].input_ids[:256] for i in np.linspace(0, len(rows) - 1, given.rows, dtype=int)]
    teacher = ModelFolder.find(given.model).load("float32").eval()
    truth = []
    with torch.no_grad():
        for ids in chosen:
            truth.append(teacher(torch.from_numpy(ids[None].astype(np.int64))).logits[0, :-1])
    full = torch.cat(truth).log_softmax(-1)
    best, best_ids = full.topk(64)
    tail = full.scatter(1, best_ids, -torch.inf).logsumexp(-1)
    topk = TopK.from_dense(best_ids, best, tail)
    targets = [dequantise(quantise(cut(topk, *how), vocab, 1 / 16)) for how in CUTS]
    spread = [float(p.detach().std()) if p.dim() > 1 else 0.0 for p in teacher.parameters()]
    many = range(given.draws)
    draws = [drawn_targets(full, *how, many) for how in SAMPLED]
    names, columns, sampled_errors = [], [], []
    for noise in map(float, given.noise.split(",")):
        student = copy.deepcopy(teacher)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter, size in zip(student.parameters(), spread, strict=True):
                parameter += noise * size * torch.randn(parameter.shape, generator=generator)
        logits = torch.cat(
            [student(torch.from_numpy(i[None].astype(np.int64))).logits[0, :-1] for i in chosen]
        )
        exact = (full.exp() * (full - logits.log_softmax(-1))).sum(-1).mean()
        wanted = gradient(student, exact)
        errors = []
        for target in targets:
            ids, logprobs = map(torch.from_numpy, target.dense())
            tails = torch.from_numpy(target.tail_logprob)
            loss = sparse_divergence(logits, ids.long(), logprobs, tails, "forward").mean()
            errors.append(float((gradient(student, loss) - wanted).norm() / wanted.norm()))
        log_q = logits.log_softmax(-1)
        sampled_errors.append(
            [
                [
                    float((gradient(student, loss) - wanted).norm() / wanted.norm())
                    for loss in (-(p * log_q).sum(-1).mean() for p in (single, mean))
                ]
                for single, mean, _, _ in draws
            ]
        )
        names.append(f"noise {noise:g}, KL {exact.item():.2g}")
        columns.append(errors)
    kls = [
        float(codec_kl(cut(topk, *how), target).mean())
        for how, target in zip(CUTS, targets, strict=True)
    ]
    head = f"{'k':>3} {'min_prob':>9} {'top_p':>6} {'entries':>8} {'bytes/token':>12} {'KL':>8}"
    print(head + "".join(f"{name:>24}" for name in names))
    for number, (k, min_prob, top_p) in enumerate(CUTS):
        size, entries = sizes[number]
        line = f"{k:>3} {min_prob:>9g} {top_p:>6g} {entries:>8.1f} {size:>12.1f}"
        line += f" {kls[number]:>8.1e}"
        print(line + "".join(f"{errors[number]:>24.4f}" for errors in columns))
    print(f"\nsampled, {len(full):,} tokens: error of one draw, and of the mean over {given.draws}")
    head = f"{'k':>3} {'samples':>9} {'ids':>6} {'bytes/token':>12}"
    print(head + "".join(f"{name:>24}" for name in names))
    for number, (k, samples) in enumerate(SAMPLED):
        *_, ids_drawn, size = draws[number]
        size += sizes[0][0] if k else 0
        line = f"{k:>3} {samples:>9} {ids_drawn:>6.1f} {size:>12.1f}"
        both = [errors[number] for errors in sampled_errors]
        print(line + "".join(f"{f'{one:.4f}, {mean:.4f}':>24}" for one, mean in both))


if __name__ == "__main__":
    main()
