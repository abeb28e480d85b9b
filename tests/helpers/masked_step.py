"""One optimizer step of stage two on sequences with masks, in float64; alone or on several ranks:

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.helpers.masked_step \\
        FOLDER ddp

writes FOLDER/ddp.pt: what `step` returns, by case and direction.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from pipeline.config import CorpusConfig, LossConfig, TrainConfig
from pipeline.data.mixing import DOMAIN, MixedDataset
from pipeline.data.orders import permutation
from pipeline.losses import Direction
from pipeline.token_sequences import Tokens
from pipeline.training.arguments import training_arguments
from pipeline.training.forward import add_distill_forward
from pipeline.training.trainer import DistillTrainer
from storage import Record, TopK
from storage.targets import Bools
from tests.helpers.losses import teacher
from tests.helpers.masks import masked, sequences_of, some_targets

VOCAB, K, ALPHA, SEED = 50, 6, 0.7, 3
LENGTHS = [(9, 12), (30, 5), (2, 17), (14, 14), (21, 8), (6, 25), (11, 3), (18, 10)]
"""Tokens of the domain and of the general sequence of each item of the step."""
OF_RANK_1 = (2, 3, 6, 7)
"""The items that rank 1 of two gets in two micro-batches of two."""
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")


class Layout(NamedTuple):
    """How the items of the step are split. Their gradient does not depend on it."""

    batch: int
    accumulation: int
    row_tokens: int | None = None
    fsdp: bool = False


LAYOUTS = {
    "one row": Layout(8, 1),
    "micro-batches": Layout(2, 4),
    "short rows": Layout(4, 2, 40),
    "ddp": Layout(2, 2, 40),
    "fsdp": Layout(2, 2, 40, fsdp=True),
}
CASES = ("some", "none on rank 1", "none")


class Item(NamedTuple):
    domain: Tokens
    whole: Record
    """The general sequence, as a dump without masks stores it."""
    targets: Bools
    """Of the general sequence."""


def items(case: str) -> list[Item]:
    """The step's sequences. In the cases "none …", masks leave out all tokens of some or all."""
    found = []
    for at, lengths in enumerate(LENGTHS):
        ids = [np.random.default_rng([at, n]).integers(0, VOCAB, n, np.int32) for n in lengths]
        masks = [some_targets(n, seed=at) for n in lengths]
        if case == "none" or (case == "none on rank 1" and at in OF_RANK_1):
            masks = [np.zeros_like(mask) for mask in masks]
        topk = exact_topk(lengths[1] - 1, at)
        found.append(Item(Tokens(ids[0], masks[0]), Record(str(at), 0, ids[1], topk), masks[1]))
    return found


def exact_topk(positions: int, seed: int) -> TopK:
    """Random distributions in float64, whose masses sum to one to its last digits."""
    logits = torch.randn(positions, VOCAB, generator=torch.Generator().manual_seed(seed)).double()
    ids, logprobs, tail = (each.numpy() for each in teacher(3 * logits, K))
    counts = np.full(positions, K, np.uint16)
    return TopK(counts, ids.reshape(-1).astype(np.int32), logprobs.reshape(-1), tail)


def model() -> GPT2LMHeadModel:
    """Without a step that is float32 in any case, as the norms of Llama are."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    calm = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**shape, **calm, **ends)).double()


class InOrder:
    """The general stream: one record for each item."""

    def __init__(self, records: list[Record]) -> None:
        self.every = records

    def records(self, rows: Iterable[int]) -> list[Record]:
        return [self.every[row] for row in rows]

    def epochs(self, rows: int) -> list[float]:
        return [0.0]


class Gradients(TrainerCallback):
    """Takes the gradients of the step before the optimizer has them."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        for name, parameter in model.named_parameters():
            whole = parameter.grad
            assert whole is not None
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            self.found[name.removeprefix("module.")] = whole.clone()


def trainer_of(folder: Path, given: list[Item], direction: Direction, how: Layout) -> Any:
    training = {
        "per_device_train_batch_size": how.batch,
        "gradient_accumulation_steps": how.accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "optim": "sgd",
    }
    if how.fsdp:
        training |= {"fsdp": True, "fsdp_config": {"version": 2}}
    unread = CorpusConfig("unread")
    config = TrainConfig("unread", unread, str(folder / "run"), "unread", training=training)
    args = training_arguments(config)
    order = permutation(len(given), SEED, DOMAIN, 0)
    domain = [given[at].domain for at in np.argsort(order)]
    general: Any = InOrder([masked(item.whole, item.targets) for item in given])
    dataset = MixedDataset(sequences_of(domain), general, 1.0, SEED, len(given))
    student = model()
    add_distill_forward(student, direction)
    loss = LossConfig(direction=direction, alpha=ALPHA)
    return DistillTrainer(student, args, dataset, loss, row_tokens=how.row_tokens)


def step(folder: Path, given: list[Item], direction: Direction, how: Layout) -> dict[str, Any]:
    """{"gradients": by parameter, "logged": the step's line}"""
    trainer, gradients = trainer_of(folder, given, direction, how), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    trainer.run_log.close()
    return {"gradients": gradients.found, "logged": trainer.state.log_history[0]}


def main(folder: str, layout: str) -> None:
    done = {
        (case, direction): step(Path(folder), items(case), direction, LAYOUTS[layout])
        for case in CASES
        for direction in DIRECTIONS
    }
    if torch.distributed.get_rank() == 0:
        torch.save(done, Path(folder) / f"{layout}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
