"""Estimate the memory of a run from the model's config, before any weight is read."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, TrainingArguments

from pipeline import losses
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.models.decoder import decoder_of
from pipeline.models.directory import ModelFolder
from pipeline.models.language_part import freeze_other_parts
from pipeline.models.own_rows import padding
from pipeline.models.packed_attention import PACKED_ON_META, noting
from pipeline.models.quantization import QuantisedSize, as_quantised
from pipeline.models.weights import quiet
from pipeline.progress import say
from pipeline.training import fsdp
from pipeline.training.student import with_lora

Rows = Sequence[Sequence[int]]
"""The lengths of the sequences of each packed row."""
PROBE = [8] * 8  # lengths of the sequences whose activations are counted; short: little attention


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, by use."""

    weights: int
    gradients: int
    optimizer: int
    loss: int
    activations: int | None
    """None if the model's forward cannot run on the meta device."""

    @property
    def lasting(self) -> int:
        """Bytes that the run needs besides activations."""
        return self.weights + self.gradients + self.optimizer + self.loss

    @property
    def total(self) -> int:
        return self.lasting + (self.activations or 0)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in asdict(self).items())
        return f"{size_text(self.total)} ({parts})"


def size_text(size: int | None) -> str:
    """Bytes as text, such as 3.4 GiB."""
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def check(
    config: TrainConfig,
    args: TrainingArguments,
    folder: ModelFolder,
    row_tokens: int,
    rows: Rows = (),
    target_share: float = 1.0,
) -> Estimate | None:
    """Print the expected memory. Raises ConfigError if it cannot fit even without activations.

    Returns None if DeepSpeed or FSDP's cpu_offload keeps parts of it elsewhere.
    """
    if args.deepspeed or (args.fsdp_plugin_args or {}).get("cpu_offload"):
        return None
    found = estimate(config, args, folder, row_tokens, rows, target_share)
    free = free_bytes(args)
    where = "GPU" if args.device.type == "cuda" else "machine"
    line = f"memory: {found} expected, {size_text(free)} free on the {where}"
    if found.lasting > free:
        raise ConfigError(f"{line}. To change: {', '.join(advice(config, args, found))}")
    if found.total > free:
        line += f". It may not fit; to change: {', '.join(advice(config, args, found))}"
    if args.process_index == 0:
        say(line)
    return found


def estimate(
    config: TrainConfig,
    args: TrainingArguments,
    folder: ModelFolder,
    row_tokens: int,
    rows: Rows = (),
    target_share: float = 1.0,
) -> Estimate:
    """Estimate for packed rows of `row_tokens` tokens, of which `target_share` have a loss.

    `rows` has the lengths of the sequences in some of them: the padding where each sequence has a
    row of its own, and the length that eager attention is paid for.

    Weights, gradients and optimizer states follow from the number and dtypes of the parameters, the
    loss from its buffers, and activations from a forward on the meta device. The total assumes that
    all of them exist at the same time. This is a little too much: gradients grow while activations
    are freed. Not included: the interpreter and CUDA's context, kernels' workspaces, fragmentation
    of the allocator, the batches, evaluation's logits and, on the CPU, the weights while they are
    loaded and saved. On a CPU the peak of a model with 26 million parameters was 1.1 to 1.4 times
    the estimate (tests/pipeline/training/test_memory.py), and on 4-bit weights within a tenth of it
    where the allocator does not fragment, 1.13 times with gradient checkpointing.
    """
    compute = torch.bfloat16 if args.bf16 else None  # None: the weights' own
    quantised = QuantisedSize()
    if config.quantization is not None:
        model, quantised = empty_quantised_student(config, folder)
        stored = torch.float32.itemsize  # what is not quantised, as peft prepares it
    else:
        model = empty_student(config, folder, compute)
        stored = weights_dtype(config, folder).itemsize
    sharded = fsdp.is_asked_for(args)
    ranks = args.world_size if sharded else 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained - quantised.weights
    # peft's adapters are float32, and FSDP keeps float32 copies of what bf16 trains.
    master = 4 if config.lora is not None or (sharded and args.bf16) else stored
    weights = (trained * master + frozen * stored) // ranks
    weights += quantised.size + quantised.workspace
    used = compute.itemsize if compute is not None else stored
    vocabulary, width = model.get_output_embeddings().weight.shape
    targets = math.ceil(row_tokens * target_share)
    if sharded:  # FSDP gathers a layer and the next one, and keeps the embeddings gathered
        weights += (2 * largest_layer(model) + 2 * vocabulary * width) * used
    elif used < stored and quantised.weights:  # what is left are embeddings and head, see the loss
        weights += trained * used
    elif used < stored:  # autocast keeps a cast of each weight between forward and backward
        weights += (trained + frozen) * used
    sets = 2 if config.gradient_cosine_steps else 1
    gradients = sets * trained * master // ranks
    with nullcontext() if config.quantization is None else as_trained(model, args):
        activations = activation_bytes(model, args, row_tokens, rows)
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=int(trained * optimizer_bytes(args.optim, master)) // ranks,
        loss=loss_bytes(args, targets, vocabulary, width, config.lora is None),
        activations=activations,
    )


def empty_student(
    config: TrainConfig, folder: ModelFolder, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model to train, on the meta device; in config.dtype by default."""
    dtype = dtype or weights_dtype(config, folder)
    with torch.device("meta"):
        model = folder.empty(dtype)
        freeze_other_parts(model)
        return with_lora(model, config)


def empty_quantised_student(
    config: TrainConfig, folder: ModelFolder
) -> tuple[PreTrainedModel, QuantisedSize]:
    """The adapters on stand-ins for quantised layers, on the meta device; what is quantised."""
    model = folder.empty(torch.float32)
    freeze_other_parts(model)
    size = as_quantised(model, config.quantization or {})
    with torch.device("meta"):
        return with_lora(model, config), size


def weights_dtype(config: TrainConfig, folder: ModelFolder) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, folder.dtype(config.dtype))
    return dtype


def largest_layer(model: PreTrainedModel) -> int:
    """Number of parameters of the largest module in a ModuleList: the unit that FSDP gathers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(
        (sum(p.numel() for p in layer.parameters()) for layers in lists for layer in layers),
        default=0,
    )


def optimizer_bytes(name: str, master: int) -> float:
    """Optimizer-state bytes per trained parameter of `master` bytes, by optimizer name.

    The names are those of transformers; an unknown name counts as Adam.
    """
    if name.startswith(("sgd", "paged")) or "adafactor" in name:  # paged states can go to the CPU
        return 0
    size = 0.5 if "4bit" in name else 1 if "8bit" in name else master
    return size * (1 if name.startswith(("lion", "rmsprop", "adagrad")) else 2)


def loss_bytes(
    args: TrainingArguments, rows: int, vocabulary: int, width: int, trained: bool
) -> int:
    """Bytes in `linear_sparse_divergence`: a chunk of logits, the gradients of weight and hidden.

    `trained`: the head's weight needs a gradient.
    """
    buffer = losses.BUFFER_BYTES.get(args.device.type, 1 << 28)
    chunk = min(rows, max(16, buffer // (4 * vocabulary)))
    logits = chunk * vocabulary * (6 if args.bf16 else 4)  # plus bfloat16 gradients or products
    head = vocabulary * width * ((4 if trained else 0) + (2 if args.bf16 else 0))
    return logits + head + 2 * rows * width * 4


def activation_bytes(
    model: PreTrainedModel, args: TrainingArguments, row_tokens: int, rows: Rows = ()
) -> int | None:
    """Bytes that autograd saves for the decoder's backward, for a row of `row_tokens` tokens.

    Layers that mix tokens without transformers' attention function, or with a state, cannot keep
    packed sequences apart, so there the tokens of `rows` count with their padding. A model's own
    eager attention saves more bytes per token the longer a sequence is.
    With gradient checkpointing: the inputs of all layers, plus the tensors that one layer saves.
    None if the forward cannot run on the meta device.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        with noting() as notes:
            saved_bytes(base)
        layers = base.config.get_text_config().num_hidden_layers
        own_rows = notes.calls < layers or base._is_stateful  # beside attention, or without it
        if own_rows:
            row_tokens = int(row_tokens / (1 - padding(rows)))
            rows = [[max(row)] * len(row) for row in rows]
        length = mean_length(rows) if notes.special else PROBE[0]
        saved = bytes_at(base, own_rows, length)
        plugin: dict[str, Any] = args.fsdp_plugin_args or {}
        if args.gradient_checkpointing or plugin.get("activation_checkpointing"):
            layer = saved // base.config.get_text_config().num_hidden_layers
            base.gradient_checkpointing_enable()
            saved = bytes_at(base, own_rows, length) + layer
    except Exception:  # an architecture's forward may read values, which meta tensors lack
        return None
    return int(saved * row_tokens) // sum(PROBE)


@contextmanager
def as_trained(model: PreTrainedModel, args: TrainingArguments) -> Iterator[None]:
    """Give a model on the meta device fake tensors, which have no storage either, but are taken for
    the CPU's, so that training's autocast works on them. The model is of no use afterwards."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    fake = torch.empty(weight.shape, dtype=weight.dtype)
                    module._parameters[name] = nn.Parameter(fake, weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield


def mean_length(rows: Rows) -> float:
    """Length of the sequence in which a token is, on average."""
    lengths = [length for row in rows for length in row]
    return sum(length**2 for length in lengths) / sum(lengths) if lengths else PROBE[0]


def bytes_at(model: PreTrainedModel, own_rows: bool, length: float) -> float:
    """Bytes for as many tokens as PROBE has, in sequences of `length`, from two short probes."""
    short = saved_bytes(model, own_rows)
    if length == PROBE[0]:
        return short
    double = [2 * length for length in PROBE[::2]]
    return short + (saved_bytes(model, own_rows, double) - short) * (length / PROBE[0] - 1)


def saved_bytes(model: PreTrainedModel, own_rows: bool = False, probe: list[int] = PROBE) -> int:
    """Bytes for sequences of equal lengths, packed or with a row for each, on the meta device."""
    with quiet():
        model.set_attn_implementation(PACKED_ON_META)
    lengths = {} if own_rows else {"sequence_lengths": probe}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used again

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    shape = (len(probe), probe[0]) if own_rows else (1, sum(probe))
    ids = torch.zeros(shape, dtype=torch.long, device=model.device)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder_of(model)(
            inputs_embeds=model.get_input_embeddings()(ids).requires_grad_(),
            position_ids=ids,
            use_cache=False,
            **lengths,
        )
    return sum(sizes.values())


def free_bytes(args: TrainingArguments) -> int:
    """Free bytes of this rank's GPU, or its share of the machine's free memory."""
    if args.device.type == "cuda":
        return int(torch.cuda.mem_get_info(args.device)[0])
    return free_on_machine()


def free_on_machine() -> int:
    """This rank's share of the machine's free bytes."""
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def advice(config: TrainConfig, args: TrainingArguments, found: Estimate) -> list[str]:
    """Changes of settings that would reduce the largest parts."""
    choices = ["use a smaller model"]
    if config.lora is None:
        choices.append("train adapters (lora: {r: 64, target_modules: all-linear})")
    if not fsdp.is_asked_for(args):
        choices.append("shard it over GPUs (training.fsdp: true, accelerate launch)")
    elif found.lasting > (found.activations or 0):
        choices.append("start more ranks")
    if config.dtype == "float32" and config.lora is not None and config.quantization is None:
        choices.append("set dtype: bfloat16")
    if config.quantization is None:
        choices.append("train adapters on 4-bit weights (quantization: {load_in_4bit: true})")
    if found.activations is None or found.activations > found.total // 4:
        if not args.gradient_checkpointing:
            choices.append("set training.gradient_checkpointing: true")
        choices.append("set row_tokens, or a smaller value of it, for shorter rows")
    return choices
