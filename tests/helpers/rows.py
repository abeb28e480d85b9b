"""A packed row with both kinds of sequences, and the losses of a student on it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pipeline.data.packing import PackedRow, pack_row, with_targets
from pipeline.training.forward import add_distill_forward
from storage import LogitDataset


def mixed_row(dump_path: Path) -> PackedRow:
    """Two domain sequences of 30 and 20 tokens, and rows 1 and 2 of the dump."""
    dump = LogitDataset(dump_path)
    domain = [dump[5].input_ids[:30], dump[6].input_ids[:20]]
    return pack_row(domain, [dump[1], dump[2]])


def losses(model: Path, row: PackedRow) -> tuple[int, torch.Tensor]:
    """(number of domain positions, the trainer's losses of all positions)"""
    student = AutoModelForCausalLM.from_pretrained(model)
    add_distill_forward(student, "forward")
    weights = torch.ones(len(row["targets"]["rows"]))
    with torch.no_grad():
        found = student(**with_targets(row, row_weights=weights))
    return len(row["targets"]["labels"]), found["losses"]
