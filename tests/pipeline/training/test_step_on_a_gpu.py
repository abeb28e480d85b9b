"""Whole training steps on fake tensors of a GPU: transformers' loop, the data loader's copies,
forward, loss, backward, clipping and AdamW. A tensor of the CPU among them, a dtype that an
operation refuses, or a value that the host asks for, is an error.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from transformers.trainer_pt_utils import AcceleratorConfig

from pipeline import losses_triton
from pipeline.config import CorpusConfig, LossConfig, TrainConfig
from pipeline.data.mixing import MixedDataset
from pipeline.models.attention import PACKED, PACKED_EAGER, Way
from pipeline.models.head import LogitTransform
from pipeline.training.arguments import defaults, training_arguments
from pipeline.training.forward import add_distill_forward
from pipeline.training.trainer import DistillTrainer
from tests.helpers.fake_cuda import FakeCuda, FakeRows, fake_cuda
from tests.helpers.masked_step import SEED, VOCAB, InOrder, items
from tests.helpers.masks import masked, sequences_of

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
PLAIN, CAPPED = LogitTransform(), LogitTransform(0.5, 30.0)
CHECKPOINTS = {"gradient_checkpointing": True}
STEPS = 1


class Stop(Exception):
    """Ends training before its last line, which reads the loss."""


class Watch(TrainerCallback):
    """Counts the waits of the steps alone, and ends training after them."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu = gpu

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.gpu.waits.clear()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == STEPS:
            raise Stop


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    """A fake GPU, which accelerate takes for this process's device."""
    states = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState)]
    with fake_cuda() as mode:
        yield mode
    for state, before in states:
        state._shared_state.clear()
        state._shared_state.update(before)


def trainer_of(folder: Path, student: PreTrainedModel, training: dict[str, Any]) -> DistillTrainer:
    given = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS + 1,
        "logging_steps": 100,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": True,
        **training,
    }
    unread = CorpusConfig("unread")
    config = TrainConfig("unread", unread, str(folder / "run"), "unread", training=given)
    args = training_arguments(config)
    with patch("torch.cuda.is_available", lambda: True):
        copies = defaults(config)["accelerator_config"]
    args.accelerator_config = AcceleratorConfig(**copies)
    args.__dict__["_setup_devices"] = torch.device("cuda", 0)
    PartialState._shared_state["device"] = torch.device("cuda", 0)
    sequences = [item for _ in range(STEPS + 1) for item in items("some")]
    domain = [item.domain for item in sequences]
    general: Any = InOrder([masked(item.whole, item.targets) for item in sequences])
    dataset = MixedDataset(sequences_of(domain), general, 1.0, SEED, len(sequences))
    return DistillTrainer(student, args, dataset, LossConfig(), row_tokens=40)


@pytest.mark.parametrize(
    ("kind", "config", "way", "transform", "training"),
    [
        (Qwen3ForCausalLM, Qwen3Config(**SHAPE), Way(PACKED), PLAIN, {"bf16": False}),
        (Qwen3ForCausalLM, Qwen3Config(**SHAPE), Way(PACKED), PLAIN, {"optim": "adamw_torch"}),
        (LlamaForCausalLM, LlamaConfig(**SHAPE), Way(PACKED), PLAIN, CHECKPOINTS),
        (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=4), Way(PACKED), PLAIN, {}),
        (Gemma2ForCausalLM, Gemma2Config(**SHAPE), Way(PACKED_EAGER), CAPPED, {}),
        (LlamaForCausalLM, LlamaConfig(**SHAPE), Way("sdpa"), PLAIN, {}),
        (LlamaForCausalLM, LlamaConfig(**SHAPE), Way("sdpa", own_rows=True), PLAIN, {}),
    ],
)
def test_steps_on_a_gpu(
    gpu: FakeCuda,
    tmp_path: Path,
    kind: Any,
    config: Any,
    way: Way,
    transform: LogitTransform,
    training: dict[str, Any],
) -> None:
    """transformers itself would ask for values, but takes fake tensors for those of a compiler.

    It must ask where its own T × T mask keeps sequences apart.
    """
    with torch.device("cuda"):
        student = kind(config)
    student.to = lambda *_, **__: student  # it is there; fake weights cannot be exchanged
    with patch("pipeline.training.forward.learnt", lambda _: (way, transform)):
        add_distill_forward(student, "forward")
    trainer = trainer_of(tmp_path, student, training)
    trainer.add_callback(Watch(gpu))
    kernel = FakeRows(losses_triton._rows, gpu)
    with (
        patch.object(losses_triton, "_rows", kernel),
        patch("pipeline.models.varlen.able", lambda _: True),
        patch("transformers.masking_utils.is_tracing", lambda _: way == Way("sdpa")),
        pytest.raises(Stop),
    ):
        trainer.train()
    assert len(kernel.launches) >= 2 * 2 * STEPS  # both corpora in each micro-batch
    assert {launch["CAP"] for launch in kernel.launches} == {transform.soft_cap or 0.0}
    assert gpu.waits == []
