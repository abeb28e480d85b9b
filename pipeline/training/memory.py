"""Estimate the memory of a run from the model's config, before any weight is read."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from pipeline import losses
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.models.attention import PACKED
from pipeline.models.directory import ModelFolder
from pipeline.models.language_part import freeze_other_parts
from pipeline.progress import say
from pipeline.training import fsdp
from pipeline.training.student import with_lora

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
    config: TrainConfig, args: TrainingArguments, folder: ModelFolder, row_tokens: int
) -> Estimate | None:
    """Print the expected memory. Raises ConfigError if it cannot fit even without activations.

    Returns None if DeepSpeed or FSDP's cpu_offload keeps parts of it elsewhere.
    """
    if args.deepspeed or (args.fsdp_plugin_args or {}).get("cpu_offload"):
        return None
    found = estimate(config, args, folder, row_tokens)
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
    config: TrainConfig, args: TrainingArguments, folder: ModelFolder, row_tokens: int
) -> Estimate:
    """Estimate for packed rows of `row_tokens` tokens, each with a loss.

    Weights, gradients and optimizer states follow from the number and dtypes of the parameters, the
    loss from its buffers, and activations from a forward on the meta device. The total assumes that
    all of them exist at the same time. This is a little too much: gradients grow while activations
    are freed. Not included: the interpreter and CUDA's context, kernels' workspaces, fragmentation
    of the allocator, the batches, evaluation's logits and, on the CPU, the weights while they are
    loaded and saved. On a CPU the peak of a model with 26 million parameters was 1.1 to 1.4 times
    the estimate (tests/pipeline/training/test_memory.py).
    """
    compute = torch.bfloat16 if args.bf16 else None  # None: the weights' own
    model = empty_student(config, folder, compute)
    stored = weights_dtype(config, folder).itemsize
    sharded = fsdp.is_asked_for(args)
    ranks = args.world_size if sharded else 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    # peft's adapters are float32, and FSDP keeps float32 copies of what bf16 trains.
    master = 4 if config.lora is not None or (sharded and args.bf16) else stored
    weights = (trained * master + frozen * stored) // ranks
    used = compute.itemsize if compute is not None else stored
    vocabulary, width = model.get_output_embeddings().weight.shape
    if sharded:  # FSDP gathers a layer and the next one, and keeps the embeddings gathered
        weights += (2 * largest_layer(model) + 2 * vocabulary * width) * used
    elif used < stored:  # autocast keeps a cast of each weight between forward and backward
        weights += (trained + frozen) * used
    sets = 2 if config.gradient_cosine_steps else 1
    gradients = sets * trained * master // ranks
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=int(trained * optimizer_bytes(args.optim, master)) // ranks,
        loss=loss_bytes(args, row_tokens, vocabulary, width, config.lora is None),
        activations=activation_bytes(model, args, row_tokens),
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
    model: PreTrainedModel, args: TrainingArguments, row_tokens: int
) -> int | None:
    """Bytes that autograd saves for the decoder's backward, for a row of `row_tokens` tokens.

    With gradient checkpointing: the inputs of all layers, plus the tensors that one layer saves.
    None if the forward cannot run on the meta device.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(PACKED)
    try:
        saved = saved_bytes(base)
        plugin: dict[str, Any] = args.fsdp_plugin_args or {}
        if args.gradient_checkpointing or plugin.get("activation_checkpointing"):
            layer = saved // base.config.get_text_config().num_hidden_layers
            base.gradient_checkpointing_enable()
            saved = saved_bytes(base) + layer
    except Exception:  # an architecture's forward may read values, which meta tensors lack
        return None
    return saved * row_tokens // sum(PROBE)


def saved_bytes(model: PreTrainedModel) -> int:
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used again

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, sum(PROBE), dtype=torch.long, device="meta")
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(
            inputs_embeds=model.get_input_embeddings()(ids).requires_grad_(),
            position_ids=ids,
            use_cache=False,
            sequence_lengths=PROBE,
        )
    return sum(sizes.values())


def free_bytes(args: TrainingArguments) -> int:
    """Free bytes of this rank's GPU, or its share of the machine's free memory."""
    if args.device.type == "cuda":
        return int(torch.cuda.mem_get_info(args.device)[0])
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
    if config.dtype == "float32" and config.lora is not None:
        choices.append("set dtype: bfloat16")
    if found.activations is None or found.activations > found.total // 4:
        if not args.gradient_checkpointing:
            choices.append("set training.gradient_checkpointing: true")
        choices.append("set row_tokens, or a smaller value of it, for shorter rows")
    return choices
