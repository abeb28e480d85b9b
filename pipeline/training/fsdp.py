"""FSDP2 through accelerate: each rank holds a share of weights, gradients and optimizer states.

`training.fsdp: true` turns it on. The loss is computed inside the wrapped forward, where FSDP has
gathered the head's weight. All other code for FSDP is here.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from pipeline.errors import ConfigError
from pipeline.progress import say

Result = TypeVar("Result")


def is_asked_for(args: TrainingArguments) -> bool:
    """Whether the settings or `accelerate launch --use_fsdp` ask for FSDP."""
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return args.fsdp_plugin_args is not None or by_launcher


def is_on(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def set_up(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Make accelerate's FSDP2 exact enough for the loss; does nothing without FSDP.

    Raises ConfigError for FSDP1, and if accelerate ignores the request for FSDP.
    """
    if is_asked_for(args) and accelerator.distributed_type == DistributedType.MULTI_CPU:
        shard_on_cpus(accelerator, args)
    if not is_on(accelerator):
        if is_asked_for(args):
            raise ConfigError(
                f"training.fsdp: accelerate does not shard on {accelerator.distributed_type}; "
                "remove training.fsdp"
            )
        return
    if not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP1 flattens the head's weight, and the loss needs it as a matrix; remove "
            "training.fsdp_config.version, or set it (FSDP_VERSION in the environment) to 2"
        )
    # Reduce at each micro-batch: otherwise each rank would hold whole gradients between them.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if accelerator.mixed_precision == "bf16":
        # accelerate's policy would round the targets' log-probabilities, the losses and the sum of
        # the ranks' gradients to bfloat16. Here autocast chooses the dtype of each operation.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def shard_on_cpus(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Set up FSDP on CPUs as accelerate does on GPUs; on CPUs accelerate silently ignores it.

    Sharding over gloo is slow, but it is the same code: you can test it before you pay for GPUs.
    """
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    for state in (accelerator.state, PartialState()):  # each new state is made from the second
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def load_on_one_rank(args: TrainingArguments) -> None:
    """With fsdp_config.cpu_ram_efficient_loading, let only rank 0 read the weights.

    transformers reads these variables when it loads a model; accelerate sets them too late.
    """
    if (args.fsdp_plugin_args or {}).get("cpu_ram_efficient_loading"):
        os.environ["ACCELERATE_USE_FSDP"] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"


def on_first_rank(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises as ConfigError on rank 0, on all ranks.

    For what is learnt from the weights: the other ranks may have none yet.
    """
    if not distributed.is_initialized():
        return work()
    found: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            found = [work()]
        except ConfigError as error:
            found = [error]
    distributed.broadcast_object_list(found)
    if isinstance(found[0], ConfigError):
        raise found[0]
    result: Result = found[0]
    return result


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward without a backward gathered; does nothing without FSDP."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def say_shares(accelerator: Accelerator, model: nn.Module) -> None:
    """Print rank 0's share of the weights. Raises ConfigError if a rank holds all of them."""
    if not is_on(accelerator):
        return
    weights = list(model.parameters())
    every = sum(weight.numel() for weight in weights)
    own = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
    if own == every:
        raise ConfigError("training.fsdp: each rank holds the whole model, nothing was sharded")
    if accelerator.is_main_process:
        say(f"FSDP: rank 0 holds {own:,} of {every:,} weights")


def whole(tensor: Tensor) -> Tensor:
    """The full value of a sum over sharded tensors, the same on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """The full state dict on rank 0's CPU, nothing on other ranks; all ranks must call it."""
    state: dict[str, Any] = accelerator.get_state_dict(model)
    return state
