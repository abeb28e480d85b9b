"""Check a dump against a model: recompute rows with transformers and report the KL of each."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from pipeline.agreement import Answer, Bounds, bounds, grid_of
from pipeline.errors import RefusedError
from pipeline.models.directory import ModelFolder
from pipeline.models.logits import logits_at
from pipeline.models.vocabulary import difference_from_dump
from pipeline.onset import describe
from pipeline.types import Int64s
from storage import LogitDataset, Record

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowCheck:
    """`kl` [P]: KL(stored ‖ recomputed) of one row in nats, over the kept ids and the tail, at its
    `positions` [P].

    For a row with samples only, it is the model's cross-entropy to the samples minus the model's
    entropy: 0 on average if the model is the teacher. `noise` is the standard error of that mean.
    """

    row: int
    doc_id: str
    chunk: int
    positions: Int64s
    kl: Floats
    noise: float = 0.0

    @property
    def kl_mean(self) -> float:
        return float(self.kl.mean())

    @property
    def kl_max(self) -> float:
        return float(self.kl.max())

    def answer(self, limits: Bounds) -> Answer:
        return limits.answer(self.kl_mean, self.noise, len(self.kl))


def against(
    dump: str, model: str, rows: int, seed: int = 0, bound: float | None = None
) -> tuple[list[str], Answer]:
    """(lines to print, the answer for at most `rows` rows of a dump, drawn with `seed`).

    `bound` is the largest mean KL of the same model in nats; by default it follows from the dump's
    grid and dtype. Raises RefusedError if the tokenizers differ.
    """
    dataset, folder = LogitDataset(dump), ModelFolder.find(model)
    plan = dataset.plan
    teacher = plan.get("teacher") or {}
    dtype = folder.dtype(teacher.get("dtype") or "auto")
    limits = bounds(bound, grid_of(dataset), dtype, dtype)
    checks = recompute(dump, model, rows, seed)
    lines, answer = report(checks, limits, folder.config.to_dict())
    if answer is not Answer.SAME and teacher.get("fingerprint") != folder.weights_fingerprint:
        lines.append(
            f"The weight files are not those of the dump's teacher ({teacher.get('name')}): a "
            "quantised or a trained copy differs like this, too"
        )
    return lines, answer


def recompute(dump: str, model: str, rows: int, seed: int = 0) -> list[RowCheck]:
    """Check at most `rows` rows, drawn with `seed`; RefusedError if the tokenizers differ."""
    dataset = LogitDataset(dump)
    folder = ModelFolder.find(model)
    difference = difference_from_dump(folder, dataset, "the model")
    if difference:
        raise RefusedError(
            f"model {model} did not make the dump {dump}: {difference}. Give the model that did"
        )
    dtype = dataset.plan.get("teacher", {}).get("dtype", "auto")
    loaded = folder.load(dtype)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(dataset), min(rows, len(dataset)), replace=False))
    return [check_row(int(row), dataset[int(row)], loaded) for row in chosen]


def check_row(row: int, record: Record, model: PreTrainedModel) -> RowCheck:
    place = row, record.doc_id, record.chunk, record.positions
    if len(record.topk.ids):
        return RowCheck(*place, row_kl(record, model))
    gap = row_gap(record, model)
    return RowCheck(*place, gap, float(gap.std()) / len(gap) ** 0.5)


@torch.inference_mode()
def row_kl(record: Record, model: PreTrainedModel) -> Floats:
    """[P] KL(stored ‖ model) in nats, at each position. What the model's head lacks is in the tail,
    and so are the columns that only it has."""
    logprobs = logprobs_of(record, model)
    topk = replace(record.topk, samples=None).fold(logprobs.shape[1])
    ids, stored = (torch.from_numpy(np.array(part)) for part in topk.dense())
    kept = torch.isfinite(stored)  # the rest is padding
    p = stored.double().exp()
    q = logprobs.gather(1, ids.long()).double()
    terms = torch.where(kept, p * (stored.double() - q), 0)
    tail = torch.from_numpy(np.array(topk.tail_logprob)).double()
    # Padding is not an id: it must not remove anything from the model's tail.
    columns = torch.where(kept, ids.long(), logprobs.shape[1])
    others = torch.nn.functional.pad(logprobs, (0, 1), value=-torch.inf)
    rest = others.scatter(1, columns, -torch.inf).double().logsumexp(-1)
    tail_term = torch.where(tail.isfinite(), tail.exp() * (tail - rest), 0)
    found: Floats = (terms.sum(1) + tail_term).numpy()
    return found


@torch.inference_mode()
def row_gap(record: Record, model: PreTrainedModel) -> Floats:
    """[P] cross-entropy of the model to the record's samples minus its entropy, in nats."""
    logprobs = logprobs_of(record, model).double()
    topk = record.topk.spread_tail().fold(logprobs.shape[1])
    ids, shares = (torch.from_numpy(np.array(part)) for part in topk.dense())
    cross = -(shares.double().exp() * logprobs.gather(1, ids.long())).sum(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    found: Floats = (cross - entropy).numpy()
    return found


def logprobs_of(record: Record, model: PreTrainedModel) -> torch.Tensor:
    """float32 [P, V] log-probabilities of the model at the row's positions, on the CPU."""
    return logits_at(model, record.input_ids, record.positions).log_softmax(-1).cpu()


def report(
    checks: list[RowCheck], limits: Bounds, settings: dict[str, Any]
) -> tuple[list[str], Answer]:
    """(lines to print, the answer for all rows): that of their mean, or of the worst row.

    `settings` is the model's config.json.
    """
    lines = [f"{'row':>10}  {'KL mean':>9}  {'KL max':>9}  document, chunk"]
    for check in checks:
        answer = check.answer(limits)
        mark = "" if answer is Answer.SAME else f"   <- {answer}"
        lines.append(
            f"{check.row:>10}  {check.kl_mean:>9.1e}  {check.kl_max:>9.1e}  "
            f"{check.doc_id}, {check.chunk}{mark}"
        )
    if not checks:
        return [*lines, "0 rows recomputed"], Answer.SAME
    kl = np.concatenate([check.kl for check in checks])
    noise = float(np.sqrt(sum((check.noise * len(check.kl)) ** 2 for check in checks))) / len(kl)
    answers = [limits.answer(float(kl.mean()), noise, len(kl))]
    answers += [check.answer(limits) for check in checks]
    answer = max(answers, key=list(Answer).index)
    lines.append(
        f"{len(checks)} rows recomputed, mean KL {kl.mean():.1e} nats, bound "
        f"{limits.limit(noise, len(kl)):.1e}. The answer: {answer}"
    )
    if answer is not Answer.SAME and not any(check.noise for check in checks):
        differ = [check for check in checks if check.answer(limits) is not Answer.SAME] or checks
        where = np.concatenate([check.positions for check in differ])
        kl = np.concatenate([check.kl for check in differ])
        lines.append(describe(kl, where, limits.same, settings))
    return lines, answer
