"""The null test: a student with the teacher's weights must have KL 0 to the teacher's dump.

It is the cheapest proof that a dump belongs to a model. It uses the packing and the loss of
training, so it finds their faults too.

The KL to samples is above 0 even for the teacher, by the noise of the draws. So a dump with exact
entries is compared by those and the tail. A dump of samples alone is compared by the student's
cross-entropy to them minus the student's own entropy: for the teacher its mean is 0, with a
standard error.

Where the weights are the teacher's, the answer is one of three (pipeline/agreement.py): the same,
computed differently by the two engines, another model.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from pipeline.agreement import Answer, Bounds, bounds, grid_of
from pipeline.config import TrainConfig
from pipeline.data.mixing import GeneralStream
from pipeline.data.packing import PackedRow, packed_rows, with_targets
from pipeline.errors import RefusedError
from pipeline.models.directory import ModelFolder
from pipeline.onset import describe
from pipeline.progress import say
from pipeline.training import fsdp
from pipeline.training.trainer import DistillTrainer
from pipeline.types import Json
from storage import Record


@dataclass(frozen=True)
class Measured:
    """The KL [N] in nats at each position, or the gap to samples; `positions` [N] from 0."""

    kl: npt.NDArray[np.float64]
    positions: npt.NDArray[np.int64]
    noise: float = 0.0
    """Standard error of the mean that the draws of samples cause."""

    @property
    def mean(self) -> float:
        return float(self.kl.mean())


def null_test(
    config: TrainConfig,
    trainer: DistillTrainer,
    general: GeneralStream,
    folder: ModelFolder,
    weights: str,
) -> Json:
    """Measure the untrained student over the first general batches: {"kl": mean nats, "answer"}.

    For a dump of samples alone, "kl" is the mean of `sample_gap`. `weights` is the fingerprint of
    the student's weights; where it is not the teacher's, "answer" is None. Raises RefusedError,
    which names what may differ, for another model, and where the two engines compute it
    differently unless null_test.accept_different is set.
    """
    size = trainer.args.train_batch_size
    rows = min(config.null_test.batches * size, sum(map(len, general.dumps)))
    dump = general.dumps[0]
    teacher = dump.plan["teacher"]  # checked with the other inputs
    sampled = dump.k == 0
    what = "cross-entropy, minus its own entropy," if sampled else "KL"
    found = measure(trainer, general, rows)
    start = f"null test: {what} of the student to the dump is {found.mean:.3g} nats"
    if weights != teacher["fingerprint"]:
        say(
            f"{start} before the first step. Its weights are not those of the teacher "
            f"({teacher['name']}), so no bound applies"
        )
        return {"kl": found.mean, "answer": None}
    limits = bounds_of(config, trainer, general, folder)
    count = len(found.kl)
    answer = limits.answer(found.mean, found.noise, count)
    start += f" over {rows} sequences, bound {limits.limit(found.noise, count):.3g}"
    result: Json = {"kl": found.mean, "answer": answer.value}
    if answer is Answer.SAME:
        say(f"{start}: the dump is this model's, {answer}")
        return result
    causes = shifts(trainer, general, rows, found.mean)
    if not causes and not sampled:
        settings = folder.config.to_dict()
        causes = [describe(found.kl, found.positions, limits.same, settings)]
    result["where"] = " ".join(causes)
    engines = (
        f"Dumped with {plan_engine(general)}, dtype {teacher.get('dtype')}; trained in "
        f"{computed_in(config, trainer, folder)}."
    )
    if answer is Answer.DIFFERENT and config.null_test.accept_different and not is_shift(causes):
        say(
            f"{start}: {answer}, which null_test.accept_different accepts. {result['where']}. "
            f"{engines} The student is also held to this difference"
        )
        return result
    advice = "Do not train on this dump before it is understood"
    if answer is Answer.DIFFERENT and not is_shift(causes):
        advice += ", or set null_test.accept_different: true to train on it as it is"
    raise RefusedError(
        f"{start}. The student has the teacher's weights, but the answer is: {answer}. "
        f"{result['where']}. {engines} {advice}."
    )


def bounds_of(
    config: TrainConfig, trainer: DistillTrainer, general: GeneralStream, folder: ModelFolder
) -> Bounds:
    """The bounds of the null test: the user's, or those of the dtypes and the coarsest grid."""
    teacher = folder.dtype(general.dumps[0].plan["teacher"].get("dtype") or "auto")
    return bounds(
        config.null_test.bound,
        max(map(grid_of, general.dumps)),
        teacher,
        computed_in(config, trainer, folder),
    )


def computed_in(config: TrainConfig, trainer: DistillTrainer, folder: ModelFolder) -> str:
    """The dtype that decides how the student rounds."""
    args = trainer.args
    if args.bf16:
        return "bfloat16"
    return "float16" if args.tf32 else folder.dtype(config.dtype)


def plan_engine(general: GeneralStream) -> str:
    return str(general.dumps[0].plan.get("engine", "an engine that the plan does not name"))


def shifts(trainer: DistillTrainer, general: GeneralStream, rows: int, mean: float) -> list[str]:
    """A line where rows and positions do not match: the student, read elsewhere, is far nearer."""
    found = {shift: measure(trainer, general, rows, shift).mean for shift in (-1, 1)}
    return [
        f"{SHIFTED} by {shift:+d} positions it is {other:.3g}: rows and positions do not match"
        for shift, other in found.items()
        if abs(other) < abs(mean) / 2
    ]


SHIFTED = "Shifted"


def is_shift(causes: list[str]) -> bool:
    return any(cause.startswith(SHIFTED) for cause in causes)


def measure(trainer: DistillTrainer, general: GeneralStream, rows: int, shift: int = 0) -> Measured:
    """The first `rows` general sequences, the student read `shift` positions off."""
    if general.dumps[0].k == 0:
        return sample_gap(trainer, general, rows, shift)
    return exact_kl(trainer, general, rows, shift)


@torch.no_grad()
def exact_kl(trainer: DistillTrainer, general: GeneralStream, rows: int, shift: int) -> Measured:
    """The KL to exact entries and the tail, in packed rows as in training."""
    size = trainer.args.train_batch_size
    trainer.model.eval()
    kl, positions = [], []
    for at in range(0, rows, size):
        records = map(exact_part, general.records(range(at, min(at + size, rows))))
        for row in packed_rows([], list(records), trainer.row_tokens, trainer.vocab_size):
            kl.append(trainer.losses_of(shifted(row, shift)))
            positions.append(row["position_ids"][0, row["targets"]["rows"]])
    fsdp.reshard(trainer.model)
    return Measured(torch.cat(kl).numpy(), torch.cat(positions).numpy())


def shifted(row: PackedRow, shift: int) -> PackedRow:
    at = (row["targets"]["rows"] + shift).clamp(0, row["input_ids"].shape[1] - 1)
    return with_targets(row, rows=at)


def exact_part(record: Record) -> Record:
    return replace(record, topk=replace(record.topk, samples=None))


@torch.no_grad()
def sample_gap(
    trainer: DistillTrainer, general: GeneralStream, rows: int, shift: int = 0
) -> Measured:
    """The student's cross-entropy to the samples minus its entropy, with its standard error."""
    model = trainer.model.eval()
    gaps, positions = [], []
    for record in general.records(range(rows)):
        (packed,) = packed_rows([], [record], vocab_size=trainer.vocab_size)
        logprobs = packed["targets"]["logprobs"].double()  # of the samples' shares; -inf is padding
        negative_entropy = torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum(1)
        cross = trainer.losses_of(shifted(packed, shift)) - negative_entropy
        input_ids = torch.from_numpy(record.input_ids[None].astype("int64")).to(model.device)
        with trainer.accelerator.autocast():
            logits = model(input_ids=input_ids, use_cache=False).logits[0, record.positions]
        entropy = torch.distributions.Categorical(logits=logits.float()).entropy()
        gaps.append(cross - entropy.double().cpu())
        positions.append(torch.from_numpy(record.positions))
    fsdp.reshard(model)
    every = torch.cat(gaps)
    noise = (every.std() / len(every) ** 0.5).item()
    return Measured(every.numpy(), torch.cat(positions).numpy(), noise)
