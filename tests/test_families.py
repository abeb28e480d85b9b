"""Models as people use them: every family that transformers and vLLM share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pipeline.data.packing import packed_rows
from pipeline.models.directory import ModelFolder
from pipeline.training.forward import add_distill_forward
from storage import Record, TopK
from tests.helpers.families import SHARED, VOCAB, tiny_family

TEXT = [name for name in SHARED if not name.endswith("ForConditionalGeneration")]
WRAPPERS = [
    f"{name}ForConditionalGeneration"
    for name in ("Gemma3", "Gemma4", "Llama4", "Mistral3", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5")
]
LENGTHS = [137, 5, 23]  # the first is longer than windows and attention chunks


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*TEXT, *WRAPPERS])
def test_a_packed_student_is_the_model(architecture: str, tmp_path: Path) -> None:
    """The loss of a packed row is the KL to the model's own eager attention, which is 0."""
    path = tiny_family(tmp_path / "model", architecture)
    auto = AutoModelForCausalLM if architecture in TEXT else AutoModelForImageTextToText
    teacher = auto.from_pretrained(path, attn_implementation="eager").eval()
    assert type(teacher).__name__ == architecture
    rng = np.random.default_rng(0)
    records = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(1, VOCAB, length, dtype=np.int32)
        with torch.no_grad():
            logits = teacher(input_ids=torch.from_numpy(ids[None]).long(), use_cache=False).logits
        logprobs = logits[0, :-1].double().log_softmax(-1)
        best, kept = logprobs.topk(64)
        tail = logprobs.scatter(1, kept, -torch.inf).logsumexp(-1)
        topk = TopK.from_dense(kept.int().numpy(), best.float().numpy(), tail.float().numpy())
        records.append(Record(str(number), 0, ids, topk))
    student = ModelFolder.find(str(path)).load("float32").eval()
    add_distill_forward(student, "forward")
    (row,) = packed_rows([], records)
    row["targets"]["row_weights"] = torch.ones(len(row["targets"]["rows"]))
    with torch.no_grad():
        losses = student(**row)["losses"]
    assert losses.abs().max() < 1e-5  # nats
