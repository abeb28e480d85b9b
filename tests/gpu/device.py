"""Where the checks run: on CUDA, or, in a rehearsal, on the CPU at small sizes."""

import os
from importlib.util import find_spec

REHEARSAL = "GPU_CHECK_REHEARSAL"
"""Environment variable: set, the checks run on the CPU, to see that they run at all."""
REHEARSED = bool(os.environ.get(REHEARSAL))
DEVICE = "cpu" if REHEARSED else "cuda"


def missing(devices: int, package: str | None) -> str | None:
    """What a check lacks here, as a text; None if it can run."""
    if package is not None and find_spec(package) is None:
        return f"{package} is not installed"
    if REHEARSED:
        return None  # processes stand for devices
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < devices:
        return f"needs {devices} CUDA devices, found {found}" if found else "no CUDA device"
    return None
