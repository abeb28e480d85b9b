"""Check a dump against a model: recompute rows with transformers and report the KL of each."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.agreement import limit
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from storage import LogitDataset, Record


@dataclass(frozen=True)
class RowCheck:
    """KL(stored ‖ recomputed) of one row in nats, over the kept ids and the tail.

    For a row with samples only, it is the model's cross-entropy to the samples minus the model's
    entropy: 0 on average if the model is the teacher. `noise` is the standard error of that mean.
    """

    row: int
    doc_id: str
    chunk: int
    kl_mean: float
    kl_max: float
    noise: float = 0.0

    def within(self, bound: float) -> bool:
        return abs(self.kl_mean) <= limit(bound, self.noise)  # False for NaN


def recompute(dump: str, model: str, rows: int, seed: int = 0) -> list[RowCheck]:
    """Check at most `rows` rows, drawn with `seed`; ConfigError if the vocabularies differ."""
    dataset = LogitDataset(dump)
    folder = ModelFolder.find(model)
    if folder.vocab_size != dataset.plan["vocab_size"]:
        raise ConfigError(
            f"model {model}: {folder.vocab_size} ids, the dump has {dataset.plan['vocab_size']}; "
            "give the model that made the dump"
        )
    dtype = dataset.plan.get("teacher", {}).get("dtype", "auto")
    loaded = folder.load(dtype)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(dataset), min(rows, len(dataset)), replace=False))
    return [check_row(int(row), dataset[int(row)], loaded) for row in chosen]


def check_row(row: int, record: Record, model: torch.nn.Module) -> RowCheck:
    noise = 0.0
    if len(record.topk.ids):
        kl = row_kl(record, model)
    else:
        kl = row_gap(record, model)
        noise = float(kl.std()) / len(kl) ** 0.5
    return RowCheck(row, record.doc_id, record.chunk, float(kl.mean()), float(kl.max()), noise)


@torch.inference_mode()
def row_kl(record: Record, model: torch.nn.Module) -> npt.NDArray[np.float64]:
    """[P] KL(stored ‖ model) in nats, at each position."""
    logprobs = logprobs_of(record, model)
    ids, stored = (torch.from_numpy(np.array(part)) for part in record.topk.dense())
    kept = torch.isfinite(stored)  # the rest is padding
    p = stored.double().exp()
    q = logprobs.gather(1, ids.long()).double()
    terms = torch.where(kept, p * (stored.double() - q), 0)
    tail = torch.from_numpy(np.array(record.topk.tail_logprob)).double()
    # Padding is not an id: it must not remove anything from the model's tail.
    columns = torch.where(kept, ids.long(), logprobs.shape[1])
    others = torch.nn.functional.pad(logprobs, (0, 1), value=-torch.inf)
    rest = others.scatter(1, columns, -torch.inf).double().logsumexp(-1)
    tail_term = torch.where(tail.isfinite(), tail.exp() * (tail - rest), 0)
    found: npt.NDArray[np.float64] = (terms.sum(1) + tail_term).numpy()
    return found


@torch.inference_mode()
def row_gap(record: Record, model: torch.nn.Module) -> npt.NDArray[np.float64]:
    """[P] cross-entropy of the model to the record's samples minus its entropy, in nats."""
    logprobs = logprobs_of(record, model).double()
    ids, shares = (torch.from_numpy(np.array(part)) for part in record.topk.spread_tail().dense())
    cross = -(shares.double().exp() * logprobs.gather(1, ids.long())).sum(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    found: npt.NDArray[np.float64] = (cross - entropy).numpy()
    return found


def logprobs_of(record: Record, model: torch.nn.Module) -> torch.Tensor:
    """float32 [P, V] log-probabilities of the model, on the CPU."""
    device = next(model.parameters()).device
    input_ids = torch.from_numpy(record.input_ids[None].astype(np.int64)).to(device)
    logits = model(input_ids, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).cpu()


def report(checks: list[RowCheck], bound: float) -> tuple[list[str], bool]:
    """(lines to print, whether every row's mean is within `bound` nats)."""
    lines = [f"{'row':>10}  {'KL mean':>9}  {'KL max':>9}  document, chunk"]
    for check in checks:
        mark = "" if check.within(bound) else "   <- FAULT"
        lines.append(
            f"{check.row:>10}  {check.kl_mean:>9.1e}  {check.kl_max:>9.1e}  "
            f"{check.doc_id}, {check.chunk}{mark}"
        )
    wrong = sum(not check.within(bound) for check in checks)
    mean = float(np.mean([check.kl_mean for check in checks])) if checks else 0.0
    lines.append(
        f"{len(checks)} rows recomputed, mean KL {mean:.1e} nats; {wrong} above the bound of "
        f"{bound:g}" + (": this model did not make the dump" if wrong else "")
    )
    return lines, wrong == 0
