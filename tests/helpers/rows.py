"""A packed row with both kinds of sequences, and the losses of a student on it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pipeline.data.packing import PackedRow, pack_row, with_targets
from pipeline.token_sequences import Tokens
from pipeline.training.forward import add_distill_forward
from storage import LogitDataset, Record
from tests.helpers.masks import masked, some_targets


def mixed_sequences(dump_path: Path, with_masks: bool = False) -> tuple[list[Tokens], list[Record]]:
    """Two domain sequences of 30 and 20 tokens, and rows 1 and 2 of the dump."""
    dump = LogitDataset(dump_path)
    domain = [Tokens(dump[5].input_ids[:30]), Tokens(dump[6].input_ids[:20])]
    general = [dump[1], dump[2]]
    if with_masks:
        domain = [Tokens(one.input_ids, some_targets(len(one))) for one in domain]
        general = [masked(one, some_targets(len(one.input_ids))) for one in general]
    return domain, general


def mixed_row(dump_path: Path, with_masks: bool = False) -> PackedRow:
    return pack_row(*mixed_sequences(dump_path, with_masks))


def losses(model: Path, row: PackedRow) -> tuple[int, torch.Tensor]:
    """(number of domain positions, the trainer's losses of all positions)"""
    student = AutoModelForCausalLM.from_pretrained(model)
    add_distill_forward(student, "forward")
    weights = torch.ones(len(row["targets"]["rows"]))
    with torch.no_grad():
        found = student(**with_targets(row, row_weights=weights))
    return len(row["targets"]["labels"]), found["losses"]
