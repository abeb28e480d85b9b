"""The null test: a student with the teacher's weights must have KL 0 to the teacher's dump.

It is the cheapest proof that a dump belongs to a model. It uses the packing and the loss of
training, so it finds their faults too.

The KL to samples is above 0 even for the teacher, by the noise of the draws. So a dump with exact
entries is compared by those and the tail. A dump of samples alone is compared by the student's
cross-entropy to them minus the student's own entropy: for the teacher its mean is 0, with a
standard error.
"""

from dataclasses import replace

import torch

from pipeline.agreement import limit
from pipeline.config import TrainConfig
from pipeline.data.mixing import GeneralStream
from pipeline.data.packing import PackedRow, packed_rows, with_targets
from pipeline.errors import RefusedError
from pipeline.progress import say
from pipeline.training import fsdp
from pipeline.training.trainer import DistillTrainer
from storage import Record


def null_test(
    config: TrainConfig,
    trainer: DistillTrainer,
    general: GeneralStream,
    weights: str,
) -> float:
    """Mean KL in nats of the untrained student to the dump, over the first general batches; for a
    dump of samples alone, the mean of `sample_gap`.

    `weights` is the fingerprint of the student's weights. Where it is the teacher's, a mean beyond
    the bound raises RefusedError, which names what may differ.
    """
    size = trainer.args.train_batch_size
    rows = min(config.null_test.batches * size, sum(map(len, general.dumps)))
    dump = general.dumps[0]
    teacher = dump.plan["teacher"]  # checked with the other inputs
    what, noise = "KL", 0.0
    if dump.k == 0:
        what = "cross-entropy, minus its own entropy,"
        kl, noise = sample_gap(trainer, general, rows)
    else:
        kl = mean_kl(trainer, general, rows, size)
    bound = limit(config.null_test.bound, noise)
    if weights != teacher["fingerprint"]:
        say(
            f"null test: {what} of the student to the dump is {kl:.3g} nats before the first step. "
            f"Its weights are not those of the teacher ({teacher['name']}), so no bound applies"
        )
        return kl
    if abs(kl) <= bound:
        say(
            f"null test: {what} of the student to the dump is {kl:.3g} nats over {rows} sequences, "
            f"bound {bound:.3g}: the dump is this model's"
        )
        return kl
    dumped = f"{dump.plan.get('engine')}, dtype {teacher.get('dtype')}"
    found = {
        shift: sample_gap(trainer, general, rows, shift)[0]
        if dump.k == 0
        else mean_kl(trainer, general, rows, size, shift)
        for shift in (-1, 1)
    }
    causes = [
        f"Shifted by {shift:+d} positions it is {other:.3g}: rows and positions do not match"
        for shift, other in found.items()
        if abs(other) < abs(kl) / 2
    ] or [
        "What may differ: config.json (rope, norms), the engine's dtype or quantisation (dumped "
        f"with {dumped}; trained in {config.dtype}), the attention between packed sequences"
    ]
    raise RefusedError(
        f"null test: the student has the teacher's weights, but its {what} to the dump is {kl:.3g} "
        f"nats (bound {bound:.3g}). {'; '.join(causes)}. Do not train on this dump "
        "before it is understood."
    )


def mean_kl(
    trainer: DistillTrainer, general: GeneralStream, rows: int, size: int, shift: int = 0
) -> float:
    """Mean KL over the first `rows` general sequences, the student read `shift` positions off."""
    return trainer.mean_kl(
        shifted(row, shift)
        for at in range(0, rows, size)
        for row in packed_rows(
            [],
            [exact_part(general.record(index)) for index in range(at, min(at + size, rows))],
            trainer.row_tokens,
        )
    )


def shifted(row: PackedRow, shift: int) -> PackedRow:
    at = (row["targets"]["rows"] + shift).clamp(0, row["input_ids"].shape[1] - 1)
    return with_targets(row, rows=at)


def exact_part(record: Record) -> Record:
    return replace(record, topk=replace(record.topk, samples=None))


@torch.no_grad()
def sample_gap(
    trainer: DistillTrainer, general: GeneralStream, rows: int, shift: int = 0
) -> tuple[float, float]:
    """(mean of the student's cross-entropy to the samples minus its entropy, standard error)."""
    model = trainer.model.eval()
    gaps = []
    for row in range(rows):
        record = general.record(row)
        (packed,) = packed_rows([], [record])
        logprobs = packed["targets"]["logprobs"].double()  # of the samples' shares; -inf is padding
        negative_entropy = torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum(1)
        cross = trainer.losses_of(shifted(packed, shift)) - negative_entropy
        input_ids = torch.from_numpy(record.input_ids[None].astype("int64")).to(model.device)
        with trainer.accelerator.autocast():
            logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1]
        entropy = torch.distributions.Categorical(logits=logits.float()).entropy()
        gaps.append(cross - entropy.double().cpu())
    fsdp.reshard(model)
    every = torch.cat(gaps)
    return every.mean().item(), (every.std() / len(every) ** 0.5).item()
