"""FSDP2 through the real script: two processes on the CPU, which communicate through gloo."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import CorpusConfig, HeldOutConfig, NullTestConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.training import train
from tests.helpers.architectures import saved, tiny
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import dumped
from tests.helpers.models import tiny_model
from tests.helpers.runs import SCRIPT, assert_close, script, settings, steps, yaml_of

FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
# Only rank 0 reads the weights, activations are checkpointed, each rank writes its own shards.
SPARING = {
    "activation_checkpointing": True,
    "cpu_ram_efficient_loading": True,
    "state_dict_type": "SHARDED_STATE_DICT",
}


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(12)])


def two_ranks(config: TrainConfig, tmp_path: Path) -> str:
    done = script(yaml_of(tmp_path / "config.yaml", config), ranks=2)
    assert done.returncode == 0, done.stderr
    shares = re.search(r"rank 0 holds ([\d,]+) of ([\d,]+) weights", done.stderr)
    assert shares is not None
    own, every = (int(number.replace(",", "")) for number in shares.groups())
    assert own < 0.6 * every, "accelerate ran DDP"
    return done.stderr


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(Path(run) / "model")
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "tie", "fsdp_config"),
    [("qwen3", True, {}), ("llama", False, SPARING)],
    ids=["tied head", "untied head, sparing"],
)
def test_two_shards_learn_what_one_process_learns(
    tmp_path: Path, dump_path: Path, domain: Path, arch: Any, tie: bool, fsdp_config: dict[str, Any]
) -> None:
    student = tiny_model(tmp_path / "student", arch, tie)
    common: dict[str, Any] = {
        "row_tokens": 150,
        "gradient_cosine_steps": 5,
        "held_out": HeldOutConfig(domain=CorpusConfig(str(domain))),
    }
    training = {
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 10,
        "eval_strategy": "steps",
    }
    training |= {"eval_steps": 4, "gradient_accumulation_steps": 2}
    one = settings(
        tmp_path, student, dump_path, domain, **common, null_test=NullTestConfig(batches=1),
        output=str(tmp_path / "one"), training=training | {"per_device_train_batch_size": 4},
    )  # fmt: skip
    expected = train.run(one)
    sharded = settings(
        tmp_path, student, dump_path, domain, **common, null_test=NullTestConfig(batches=2),
        output=str(tmp_path / "sharded"),
        training=training | FSDP | {"fsdp_config": {"version": 2, **fsdp_config}},
    )  # fmt: skip
    two_ranks(sharded, tmp_path)
    assert len(steps(sharded.output)) == 10
    assert_close(steps(sharded.output), steps(one.output))
    summary = json.loads((tmp_path / "sharded" / "summary.json").read_text())
    assert summary["null_test_kl"] == pytest.approx(expected["null_test_kl"], rel=1e-3, abs=1e-6)
    name = "eval_domain_perplexity"
    assert summary[name] == pytest.approx(expected[name], rel=1e-4)
    found, plain = weights(sharded.output), weights(one.output)
    assert found.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-4)

    # As if killed after step 8: the same command resumes and ends with the same weights.
    shutil.rmtree(tmp_path / "sharded" / "model")
    (tmp_path / "sharded" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-10", ignore_errors=True)
    logged = steps(sharded.output)
    assert "resuming from checkpoint-8" in two_ranks(sharded, tmp_path)
    assert_close(steps(sharded.output), logged)
    again = weights(sharded.output)
    for key, value in found.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_shards_in_bfloat16_with_adapters(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    """Only matrix products are rounded; the wrapped forward returns the losses in float32."""
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        dtype="bfloat16",
        lora={"r": 4, "target_modules": "all-linear"},
        training=FSDP | {"bf16": True, "max_steps": 8, "learning_rate": 1e-2},
    )
    two_ranks(config, tmp_path)
    logged = steps(config.output)
    assert 0 <= logged[0]["kl"] < 2e-3
    ces = torch.tensor([line["ce"] for line in logged])
    assert (ces.half() != ces).all()  # sums of bfloat16 losses of two ranks would fit into 11 bits
    assert logged[-1]["ce"] < logged[0]["ce"]
    before = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    after = {name: value.bfloat16() for name, value in weights(config.output).items()}
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert changed
    assert all("proj" in name for name in changed)


def test_fsdp_in_a_single_process_is_refused(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    config = settings(tmp_path, model_path, dump_path, domain, training=FSDP)
    with pytest.raises(ConfigError, match="one process cannot share the model out"):
        train.run(config)
    assert "ACCELERATE_USE_FSDP" not in os.environ  # or the next run in this process would use it


LEAVES = """
import atexit, sys
from torch import distributed
from pipeline.training import train

atexit.register(print, "reporters are done")
if sys.argv[1] == "rank":
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
train.leave(75)
print("alone")
"""


def test_a_rank_leaves_with_its_code_after_the_exit_handlers() -> None:
    def leaves(who: str) -> tuple[int, list[str]]:
        command = [sys.executable, "-c", LEAVES, who]
        done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1])
        return done.returncode, done.stdout.splitlines()

    assert leaves("rank") == (75, ["reporters are done"])
    assert leaves("alone") == (0, ["alone", "reporters are done"])


@pytest.mark.long
def test_two_shards_with_a_row_for_each_sequence(tmp_path: Path, domain: Path) -> None:
    """One packed row stays one forward of the decoder, so the ranks stay in step."""
    model = saved(tiny("lfm2"), tmp_path / "model")
    made = dumped(model, write_texts(tmp_path / "general.jsonl", some_texts(8)), tmp_path / "dump")
    training = {"max_steps": 4, "gradient_accumulation_steps": 2}
    common: dict[str, Any] = {"row_tokens": 150, "null_test": NullTestConfig(batches=2)}
    one = settings(
        tmp_path, model, made, domain, **common, output=str(tmp_path / "one"),
        training=training | {"per_device_train_batch_size": 4},
    )  # fmt: skip
    train.run(one)
    for name, fsdp_config in (("plain", {}), ("sparing", SPARING)):
        sharded = settings(
            tmp_path, model, made, domain, **common, output=str(tmp_path / name),
            training=training | FSDP | {"fsdp_config": {"version": 2, **fsdp_config}},
        )  # fmt: skip
        assert "has a row of its own" in two_ranks(sharded, tmp_path)
        assert_close(steps(sharded.output), steps(one.output))
