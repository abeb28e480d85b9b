"""Copies from the host to a GPU for which the host does not wait."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """CPU tensor `values` on `device`.

    A copy from pageable memory waits until the GPU has done all that it was given before. From
    pinned memory it takes its turn there.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
