"""Models as people use them: every family that transformers and vLLM share."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pipeline.data.packing import packed_rows
from pipeline.models.directory import ModelFolder
from pipeline.training.forward import add_distill_forward
from storage import Record, TopK
from tests.helpers.families import LEFT_OUT, SHARED, VOCAB, model_types, tiny_family
from tests.helpers.supported import STEPS, SUPPORTED, rows_of, write_table

TEXT = [name for name in SHARED if not name.endswith("ForConditionalGeneration")]
WRAPPERS = [
    f"{name}ForConditionalGeneration"
    for name in ("Gemma3", "Gemma4", "Llama4", "Mistral3", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5")
]
LENGTHS = [137, 5, 23]  # the first is longer than windows and attention chunks
REAL = ["Gemma2ForCausalLM", "GptOssForCausalLM"]


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


@pytest.mark.vllm
def test_families_through_the_whole_pipeline(tmp_path: Path) -> None:
    """A soft cap; sinks."""
    command = [sys.executable, "-m", "tests.helpers.matrix", "--results", str(tmp_path), "--only"]
    run = subprocess.run([*command, *REAL], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in REAL}
    for name, result in found.items():
        assert not any(result["steps"].values()), (name, result)
        assert result["answer"] == "the same", (name, result)
        assert result["way"] == "plug-in", (name, result)


@pytest.mark.vllm
def test_every_shared_family_is_in_the_table() -> None:
    from vllm.model_executor.models import ModelRegistry

    both = set(model_types()) & set(ModelRegistry.get_supported_archs())
    assert both == set(SHARED) | set(LEFT_OUT)
    assert rows_of(SUPPORTED.read_text()) == SHARED


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    done = {"architecture": "", "way": "plug-in", "dtype": "float32", "packing": "packed"}
    done |= {"null_kl": 1e-4, "answer": "the same", "steps": dict.fromkeys(STEPS, 0)}
    results = {
        "GemmaForCausalLM": done,
        "PhiForCausalLM": {
            **done,
            "null_kl": 0.3,
            "answer": "computed differently by the two engines",
        },
        "OPTForCausalLM": {**done, "null_kl": None, "answer": "", "steps": {"build": 0, "dump": 2}},
        "GlmForCausalLM": {**done, "steps": {**done["steps"], "compare": 4}},
        "MambaForCausalLM": {**done, "null_kl": 1e-3, "dtype": "bfloat16"},
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text("Text.\n<!-- table -->\nold\n<!-- end of the table -->\nMore.\n")
    write_table(tmp_path, page)
    found = page.read_text()
    assert rows_of(found) == SHARED
    assert found.startswith("Text.\n")
    assert found.endswith("\nMore.\n")
    assert "old" not in found
    left = len(SHARED) - len(results)
    assert f"2 whole, 1 differs, 2 stops, {left} not measured" in found
    assert "| GemmaForCausalLM | plug-in | packed | 1.0e-04 |  |" in found
    assert "| OPTForCausalLM | plug-in | packed |  | stops at: dump |" in found
    assert "| GlmForCausalLM | plug-in | packed | 1.0e-04 | stops at: compare |" in found
    assert "| MambaForCausalLM | plug-in | packed | 1.0e-03 (bfloat16) |  |" in found
