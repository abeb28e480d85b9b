"""What rounding costs the student: a grid of logarithms beside one of roots, in both directions.

    python scripts/benchmarks/bench_grids.py MODEL SAMPLE.npz --rows 8

SAMPLE.npz has input_ids [N, T], ids and logprobs [N, T, K] and vocab_size, from MODEL. Bytes are
those of payloads, by version 2 for logarithms and version 3 for roots, with tables that were learnt
on the other rows. MODEL is run on the first 256 tokens of some rows. The students are the model
with noise on its weights. Errors are those of the student's whole gradient, relative to the
gradient with the same top-k and tail before they were rounded.
"""

import argparse
import copy
import os

os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import numpy as np
import torch

from pipeline.losses import Direction, sparse_divergence
from pipeline.models.directory import ModelFolder
from storage import Successors, TopK
from storage.codec import v3_learning
from storage.codec.codec import kept, pack, quantised, restored
from storage.topk import codec_kl

# (codec, parts of 1 that its step is)
GRIDS = [("v2", 32), ("v2", 16), ("v2", 8), ("v3", 832), ("v3", 416), ("v3", 250), ("v3", 125)]
CUTS = (0.0, 3e-4)  # min_prob
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
Gradients = dict[Direction, torch.Tensor]


def rows_of(path: Path, cut: float) -> tuple[list[tuple[np.ndarray, TopK]], int]:
    """((input_ids, distributions) of each row, vocabulary size)."""
    data = np.load(path)
    rows = []
    for number, input_ids in enumerate(data["input_ids"]):
        logprobs = np.minimum(data["logprobs"][number, :-1].astype(np.float64), 0)
        tail = np.log(np.maximum(1 - np.exp(logprobs).sum(1), 1e-9))
        topk = TopK.from_dense(data["ids"][number, :-1], logprobs, tail)
        rows.append((input_ids.astype(np.int32), topk.cut(cut)))
    return rows, int(data["vocab_size"])


def bytes_per_token(
    rows: list[tuple[np.ndarray, TopK]], vocab: int, codec: str, step: float
) -> float:
    """Of the last quarter, by tables of the others."""
    grids = [(ids, quantised(topk, vocab, step, codec).narrow()) for ids, topk in rows]
    split = len(grids) * 3 // 4
    learn = Successors.learn if codec == "v2" else v3_learning.learn
    tables = learn(grids[:split], vocab)  # type: ignore[arg-type]
    size = sum(len(pack(grid, tables.row(ids))) for ids, grid in grids[split:])
    return size / sum(len(ids) for ids, _ in grids[split:])


def gradients(student: torch.nn.Module, logits: torch.Tensor, targets: TopK) -> Gradients:
    """Of the mean loss in all parameters, float64."""
    ids, logprobs = map(torch.from_numpy, targets.dense())
    tail, found = torch.from_numpy(targets.tail_logprob), {}
    for direction in DIRECTIONS:
        loss = sparse_divergence(logits, ids.long(), logprobs, tail, direction).mean()
        grads = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
        found[direction] = torch.cat([grad.reshape(-1) for grad in grads]).double()
    return found


def noisy(teacher: torch.nn.Module, noise: float) -> torch.nn.Module:
    """The model with noise on its weights, relative to the spread of each weight matrix."""
    student, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            size = float(parameter.std()) if parameter.dim() > 1 else 0.0
            parameter += noise * size * torch.randn(parameter.shape, generator=generator)
    return student


def logits_of(model: torch.nn.Module, chosen: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(ids[None]).logits[0, :-1] for ids in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("sample", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="rows for the gradients")
    parser.add_argument("--noise", default="0.05,0.2,0.5", help="on the weights, see bench_cutoff")
    given = parser.parse_args()
    data = {cut: rows_of(given.sample, cut) for cut in CUTS}
    rows, vocab = data[0.0]
    places = np.linspace(0, len(rows) - 1, given.rows, dtype=int)
    chosen = [torch.from_numpy(rows[i][0][:256].astype(np.int64)) for i in places]
    teacher = ModelFolder.find(given.model).load("float32").eval()
    with torch.no_grad():
        full = logits_of(teacher, chosen).log_softmax(-1)
    best, ids = full.topk(64)
    exact = TopK.from_dense(ids, best, full.scatter(1, ids, -torch.inf).logsumexp(-1))
    shapes = [(cut, codec, 1 / parts) for cut in CUTS for codec, parts in GRIDS]
    targets = [
        restored(quantised(exact.cut(cut), vocab, step, codec)) for cut, codec, step in shapes
    ]
    kls = [
        float(codec_kl(kept(exact.cut(cut), step, codec), target).mean())
        for (cut, codec, step), target in zip(shapes, targets, strict=True)
    ]
    columns = []
    for noise in map(float, given.noise.split(",")):
        student = noisy(teacher, noise)
        logits = logits_of(student, chosen)
        away = float((full.exp() * (full - logits.detach().log_softmax(-1))).sum(-1).mean())
        truth = {cut: gradients(student, logits, exact.cut(cut)) for cut in CUTS}
        errors = []
        for (cut, _, _), target in zip(shapes, targets, strict=True):
            found = gradients(student, logits, target)
            errors.append([
                float((found[each] - truth[cut][each]).norm() / truth[cut][each].norm())
                for each in DIRECTIONS
            ])  # fmt: skip
        columns.append((away, errors))
    print("| min_prob | grid | bytes/token | KL, nats |", end="")
    print("".join(f" {away:.2g} nats away: forward | reverse |" for away, _ in columns))
    for number, (cut, codec, step) in enumerate(shapes):
        size = bytes_per_token(*data[cut], codec, step)
        name = f"{'√p' if codec == 'v3' else 'log'}, 1/{1 / step:g}"
        line = f"| {cut:g} | {name} | {size:.1f} | {kls[number]:.1e} |"
        print(line + "".join(" {:.4f} | {:.4f} |".format(*errors[number]) for _, errors in columns))


if __name__ == "__main__":
    main()
