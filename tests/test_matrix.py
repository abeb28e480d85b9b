"""Families through the whole pipeline with vLLM, and the table of all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.families import LEFT_OUT, SHARED, model_types
from tests.helpers.supported import STEPS, SUPPORTED, rows_of, write_table

REAL = [
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma3ForConditionalGeneration",
]


@pytest.mark.vllm
def test_families_through_the_whole_pipeline(tmp_path: Path) -> None:
    """A soft cap; sinks; hooks of vLLM that go by the architecture's name; a wrapper."""
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


ERROR = "error: vLLM cannot run /tmp/x/model: no kernel for 96 (its log is above). If it is"


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    done = {"architecture": "", "way": "plug-in", "dtype": "float32", "packing": "packed"}
    done |= {"null_kl": 1e-4, "answer": "the same", "steps": dict.fromkeys(STEPS, 0), "error": ""}
    results = {
        "GemmaForCausalLM": done,
        "PhiForCausalLM": {
            **done,
            "null_kl": 0.3,
            "answer": "computed differently by the two engines",
        },
        "OPTForCausalLM": {
            **done,
            "null_kl": None,
            "answer": "",
            "steps": {"build": 0, "dump": 2},
            "error": ERROR,
        },
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
    assert "| stops at: dump. vLLM: no kernel for 96 |" in found
    left = len(SHARED) - len(results)
    assert f"2 whole, 1 differs, 2 stops, {left} not measured" in found
    assert "| GemmaForCausalLM | plug-in | packed | 1.0e-04 |  |" in found
    assert "| GlmForCausalLM | plug-in | packed | 1.0e-04 | stops at: compare |" in found
    assert "| MambaForCausalLM | plug-in | packed | 1.0e-03 (bfloat16) |  |" in found
