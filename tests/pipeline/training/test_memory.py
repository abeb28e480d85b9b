"""The memory estimate: its parts by hand, its total against the peak of a run, and refusals."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import NullTestConfig
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.training import memory, train
from pipeline.training.arguments import training_arguments
from pipeline.training.student import load_student
from tests.helpers.architectures import saved, tiny
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model
from tests.helpers.runs import NF4, settings, yaml_of

# Prints the estimate, and the peak of the resident set above its size before the model is loaded;
# with a second argument, of memory that no file is behind: quantised weights are not mapped.
MEASURE = """
import sys, threading, time
from pathlib import Path
from pipeline.training import memory
from pipeline.training import student
from pipeline.training import train
from pipeline.config import TrainConfig
from pipeline.cli import parse, script_parser

def resident():
    _, every, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (every - of_files * (len(sys.argv) > 2)) * 4096

def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)

def save(*_):
    print("PEAK", peak[0] - before[0])
    sys.exit()

def load(*arguments):
    before.append(resident())
    threading.Thread(target=watch, daemon=True).start()
    return plain(*arguments)

plain, before, peak = student.load_student, [], [0]
train.save_final, train.load_student = save, load
check = memory.check
def checked(*arguments):
    print("ESTIMATE", check(*arguments).total)
memory.check = checked
config, _ = parse(script_parser(TrainConfig, ""), TrainConfig, ["--config", sys.argv[1]])
train.run(config)
"""


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(12)])


def estimate_of(config: Any, row_tokens: int = 100, **changes: Any) -> memory.Estimate:
    config.training = {**config.training, **changes}
    args = training_arguments(config)
    return memory.estimate(config, args, ModelFolder(Path(config.model)), row_tokens)


def test_parts_equal_those_by_hand(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    from transformers import AutoModelForCausalLM

    size = AutoModelForCausalLM.from_pretrained(model_path).num_parameters()
    config = settings(tmp_path, model_path, dump_path, domain)
    full = estimate_of(config)
    assert (full.weights, full.gradients, full.optimizer) == (4 * size, 4 * size, 8 * size)
    assert estimate_of(config, optim="sgd").optimizer == 0
    assert estimate_of(config, optim="adafactor").optimizer == 0
    single = estimate_of(config, 100).activations
    assert single is not None
    assert estimate_of(config, 200).activations == pytest.approx(2 * single)
    assert 0 < (estimate_of(config, gradient_checkpointing=True).activations or 0) < single
    config.training = {**config.training, "gradient_checkpointing": False, "optim": "adamw_torch"}
    config.gradient_cosine_steps = 10
    assert estimate_of(config).gradients == 8 * size
    config.gradient_cosine_steps = 0
    config.dtype = "bfloat16"
    half = estimate_of(config)
    assert (half.weights, half.gradients, half.optimizer) == (2 * size, 2 * size, 4 * size)
    config.lora = {"r": 2, "target_modules": ["q_proj"]}
    adapters = 2 * 2 * (64 + 64)  # layers, rank, width in and out
    lora = estimate_of(config)
    assert (lora.gradients, lora.optimizer) == (4 * adapters, 8 * adapters)
    assert lora.weights == 2 * size + 4 * adapters


def test_the_loss_takes_memory_for_its_targets(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    config = settings(tmp_path, model_path, dump_path, domain)
    args, folder = training_arguments(config), ModelFolder(model_path)
    every, some = (
        memory.estimate(config, args, folder, 100, target_share=share) for share in (1, 0.2)
    )
    assert every.loss - some.loss == 80 * (512 + 2 * 64) * 4  # logits; hidden states, gradients
    assert every.activations == some.activations


def test_activations_are_what_autograd_saves(model_path: Path) -> None:
    """A pass on the meta device, compared with one on the CPU."""
    from transformers import AutoModelForCausalLM

    from pipeline.models.attention import PACKED

    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.set_attn_implementation(PACKED)
    model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(
            input_ids=ids, position_ids=ids, use_cache=False, sequence_lengths=memory.PROBE
        )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    empty.set_attn_implementation(PACKED)
    assert memory.saved_bytes(empty) == pytest.approx(sum(sizes.values()), rel=0.15)


def test_activations_are_unknown_if_the_forward_needs_values(
    model_path: Path, dump_path: Path, domain: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    config = settings(tmp_path, model_path, dump_path, domain)
    known = estimate_of(config)

    def refuses(*_: Any, **__: Any) -> None:
        torch.zeros(1, device="meta").item()

    monkeypatch.setattr("transformers.Qwen3Model.forward", refuses)
    found = estimate_of(config)
    assert found.activations is None
    assert found.total == known.lasting
    assert "activations unknown" in str(found)


def measured(config: Any, tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, int]:
    """(estimate, peak) of a run in a process of its own, in bytes."""
    file = yaml_of(tmp_path / "config.yaml", config)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    expected = int(words[words.index("ESTIMATE") + 1])
    peak = int(words[words.index("PEAK") + 1])
    print(f"estimate {expected / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")
    return expected, peak


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_activations_on_4_bit_weights_are_what_autograd_saves(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path, bf16: bool, computed: str
) -> None:
    pytest.importorskip("bitsandbytes")
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        lora={"r": 16, "target_modules": "all-linear"},
        quantization={**NF4, "bnb_4bit_compute_dtype": computed},
        training={"bf16": bf16},
    )
    found = estimate_of(config, sum(memory.PROBE)).activations
    student, _ = load_student(config, ModelFolder(model_path), training_arguments(config))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert memory.saved_bytes(student.get_base_model()) == found


@pytest.mark.long
@pytest.mark.parametrize(
    ("computed", "changes"),
    [("float32", {}), ("bfloat16", {"bf16": True})],
    ids=["float32", "bf16"],
)
def test_estimate_on_4_bit_weights_is_within_a_tenth_of_the_peak(
    tmp_path: Path,
    dump_path: Path,
    domain: Path,
    computed: str,
    changes: dict[str, Any],
) -> None:
    """What is freed is given back, and kernels keep nothing: the peak is what is held at once."""
    config = settings(
        tmp_path,
        tiny_model(tmp_path / "student", hidden_size=1024, layers=8),
        dump_path,
        domain,
        lora={"r": 16, "target_modules": "all-linear"},
        quantization={**NF4, "bnb_4bit_compute_dtype": computed},
        null_test=NullTestConfig(batches=0),
        row_tokens=300,
        training={"max_steps": 2, "per_device_train_batch_size": 3, **changes},
    )
    plain = {"MALLOC_MMAP_THRESHOLD_": "131072", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    expected, peak = measured(config, tmp_path, "anonymous", LRU_CACHE_CAPACITY="1", **plain)
    assert 0.9 < peak / expected < 1.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="float32"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing", marks=pytest.mark.long),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.long),
    ],
)
def test_estimate_is_near_the_peak(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path, changes: dict[str, Any]
) -> None:
    student = tiny_model(tmp_path / "student", hidden_size=1024, layers=4)
    config = settings(
        tmp_path,
        student,
        dump_path,
        domain,
        training={"max_steps": 3, "per_device_train_batch_size": 8, **changes},
    )
    expected, peak = measured(config, tmp_path)
    assert expected > 300 * 2**20
    assert 0.5 < peak / expected < 1.7


def test_a_model_that_cannot_fit_is_refused_before_weights_load(
    tmp_path: Path, dump_path: Path, domain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_model(tmp_path / "student")
    config = settings(tmp_path, student, dump_path, domain)
    monkeypatch.setattr(memory, "free_bytes", lambda args: 100_000)
    monkeypatch.setattr(train, "load_student", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=r"memory: .* free on the machine. To change: .*lora"):
        train.run(config)


def test_a_run_that_may_not_fit_gets_a_warning(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path, capsys: Any, monkeypatch: Any
) -> None:
    config = settings(tmp_path, model_path, dump_path, domain, training={"max_steps": 1})
    lasting = estimate_of(config, 150).lasting
    monkeypatch.setattr(memory, "free_bytes", lambda args: lasting + 1_500_000)
    train.run(config)
    talk = capsys.readouterr().err
    assert "It may not fit" in talk
    assert "gradient_checkpointing: true" in talk


@pytest.mark.parametrize(
    ("kind", "times"), [("llama", 1), ("lfm2", 1.5), ("mamba2", 1.5), ("falcon_h1", 1.5)]
)
def test_padding_counts_where_sequences_have_rows_of_their_own(
    kind: str, times: float, tmp_path: Path
) -> None:
    """The activations of a row that is a third padding are those of a row half as long again."""
    folder = ModelFolder(saved(tiny(kind), tmp_path / "model"))
    config = settings(tmp_path, folder.path, None, tmp_path / "d.jsonl", mix=0, max_length=50)
    args = training_arguments(config)
    packed, padded = (memory.estimate(config, args, folder, 200, rows) for rows in ((), [[30, 10]]))
    assert packed.activations is not None
    assert padded.activations == pytest.approx(times * packed.activations, rel=1e-3)
    assert padded.lasting == packed.lasting


@pytest.mark.parametrize("length", [20, 50])
def test_eager_attention_is_paid_by_the_length_of_the_sequences(
    length: int, tmp_path: Path
) -> None:
    """A line through two short probes, compared with a pass over the sequences themselves."""
    folder = ModelFolder(saved(tiny("gemma2"), tmp_path / "model"))
    empty = folder.empty(torch.float32)
    expected = memory.saved_bytes(empty, probe=[length] * 4)
    found = memory.bytes_at(empty, False, length) * 4 * length / sum(memory.PROBE)
    assert found == pytest.approx(expected, rel=0.02)
    assert memory.mean_length([[length] * 4]) == length
    config = settings(tmp_path, folder.path, None, tmp_path / "d.jsonl", mix=0, max_length=50)
    args = training_arguments(config)
    estimate = memory.estimate(config, args, folder, 4 * length, [[length] * 4])
    assert estimate.activations == pytest.approx(expected, rel=0.02)
