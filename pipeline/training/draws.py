"""Random draws, of dropout for one, outside of a training step: they leave the steps' own alone."""

from contextlib import AbstractContextManager

import torch


def own_draws(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside leaves torch's generators, of the CPU and of `device`, as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)
