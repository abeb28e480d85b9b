"""The null test: a student that still is the teacher must have KL 0 to the teacher's dump.

The cheapest proof that a dump belongs to a model. It goes the way of training, packing and loss
included, so it finds what is wrong there, too.
"""

from collections.abc import Iterator
from typing import Any

import torch

from pipeline.config import RefusedError, TrainConfig
from pipeline.data import packed_rows
from pipeline.mixing import GeneralStream
from pipeline.progress import say
from pipeline.trainer import DistillTrainer


def null_test(
    config: TrainConfig,
    trainer: DistillTrainer,
    general: GeneralStream,
    weights: str,
) -> float:
    """Mean KL in nats of the untrained student to the dump, over the first general batches.

    `weights` is the fingerprint of the student's; where it is the teacher's, the bound applies:
    RefusedError beyond it, with what may differ.
    """
    size = trainer.args.train_batch_size
    rows = min(config.null_test.batches * size, sum(map(len, general.dumps)))
    kl = mean_kl(trainer, general, rows, size)
    plan = general.dumps[0].plan
    teacher = plan["teacher"]
    if weights != teacher["fingerprint"]:
        say(
            f"null test: KL of the student to the dump is {kl:.3g} nats before the first step. Its "
            f"weights are not those of the teacher ({teacher['name']}), so no bound applies"
        )
        return kl
    if kl <= config.null_test.bound:
        say(
            f"null test: KL of the student to the dump is {kl:.3g} nats over {rows} sequences, "
            f"bound {config.null_test.bound}: the dump is this model's"
        )
        return kl
    found = {shift: mean_kl(trainer, general, rows, size, shift) for shift in (-1, 1)}
    causes = [
        f"Shifted by {shift:+d} positions it is {other:.3g}: rows and positions do not match"
        for shift, other in found.items()
        if other < kl / 2
    ] or [
        "What may differ: config.json (rope, norms), the engine's dtype or quantisation (dumped "
        f"with {plan['engine']}, dtype {teacher['dtype']}; trained in {config.dtype}), the "
        "attention between packed sequences"
    ]
    raise RefusedError(
        f"null test: the student has the teacher's weights, but its KL to the dump is {kl:.3g} "
        f"nats (bound {config.null_test.bound}). {'; '.join(causes)}. Do not train on this dump "
        "before it is understood."
    )


def mean_kl(
    trainer: DistillTrainer, general: GeneralStream, rows: int, size: int, shift: int = 0
) -> float:
    """Over the first `rows` general sequences; the student is read `shift` positions off."""
    model = trainer.model.to(trainer.args.device).eval()
    total, tokens = 0.0, 0
    for batch in general_batches(general, rows, size, trainer.row_tokens):
        at = batch["targets"]["rows"] + shift
        batch["targets"]["rows"] = at.clamp(0, batch["input_ids"].shape[1] - 1)
        batch["targets"]["row_weights"] = torch.ones(len(at))
        batch = trainer._prepare_inputs(batch)
        with torch.no_grad(), trainer.accelerator.autocast():
            losses = model(**batch)["losses"]
        total, tokens = total + losses.double().sum().item(), tokens + len(losses)
    return total / tokens


def general_batches(
    general: GeneralStream, rows: int, size: int, row_tokens: int | None
) -> Iterator[dict[str, Any]]:
    for at in range(0, rows, size):
        records = [general.record(row) for row in range(at, min(at + size, rows))]
        yield from packed_rows([], records, row_tokens)
