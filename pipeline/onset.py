"""Where in a sequence two computations of one model part: what it says of the cause.

The first token attends to itself alone. So a KL there is not one of the attention between tokens.
A sliding window that differs begins at the window's length, all at once. Rope grows with distance.
Rows with masks are known at some positions alone: what differs begins behind the one before.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Shape = Literal["everywhere", "growing", "step"]
BROKEN = 1e3  # nats that NaN counts as
NEAR = 2  # positions between a step and the setting that it is taken for
LENGTHS = ("window", "chunk", "position")  # in names of settings that count tokens


def part(kl: Floats, positions: npt.NDArray[np.int64], bound: float) -> tuple[Shape, int]:
    """(shape, first position beyond rounding) of the KL [N] in nats at positions [N] from 0.

    `bound` is the largest mean KL of rounding.
    """
    tokens = np.bincount(positions).astype(np.float64)
    there = np.flatnonzero(tokens)
    finite = np.nan_to_num(kl, nan=BROKEN, posinf=BROKEN)
    means = np.bincount(positions, weights=finite)[there] / tokens[there]
    if len(there) < 3 or not means[0] <= bound:
        return "everywhere", int(there[0])
    logs, weights = np.log(np.maximum(means, bound / 100)), tokens[there]
    growth = residual(logs, weights, np.log1p(there))
    steps = [residual(logs, weights, np.arange(len(logs)) >= at) for at in range(1, len(logs))]
    at = 1 + int(np.argmin(steps))
    beyond = int(there[np.flatnonzero(means > bound)[0]])
    return ("growing", beyond) if growth < min(steps) else ("step", int(there[at]))


def residual(values: Floats, weights: Floats, along: npt.NDArray[Any]) -> float:
    """Weighted sum of squares that a line along `along` leaves of `values`."""
    root = np.sqrt(weights)
    design = np.stack([np.ones(len(values)), along.astype(np.float64)], 1) * root[:, None]
    found, *_ = np.linalg.lstsq(design, values * root, rcond=None)
    return float(((values * root - design @ found) ** 2).sum())


def describe(
    kl: Floats, positions: npt.NDArray[np.int64], bound: float, config: dict[str, Any]
) -> str:
    """Where the difference begins and what it suggests, for a message; `config` is config.json."""
    shape, at = part(kl, positions, bound)
    before, after = kl[positions < at], kl[positions >= at]
    if shape == "everywhere" and at > 0:
        return (
            f"It is there at position {at} ({kl[positions == at].mean():.1e} nats), the first that "
            "predicts a target, so nothing tells where it begins: dump a few documents with all "
            "tokens as targets, and compare those"
        )
    if shape == "everywhere":
        return (
            f"It begins at the first token ({kl[positions == at].mean():.1e} nats), which attends "
            "to itself alone: look at the norms, the activation, the head's scale and cap, the "
            "dtype, and a quantisation of one side (fp8, AWQ, GPTQ, 4 or 8 bits)"
        )
    if shape == "growing":
        return (
            f"It grows with the position, beyond rounding from position {at} on: look at the "
            "rope (theta, scaling), and at ALiBi"
        )
    begins = (
        f"It begins at position {at}: {before.mean():.1e} nats before it, {after.mean():.1e} from "
        "it on"
    )
    last = positions[positions < at].max()  # before it
    near = [
        f"{name} is {value}{layers(config, name)}"
        for name, value in lengths(config)
        if last - NEAR < value <= at + NEAR
    ]
    if near:
        return f"{begins}. In config.json {'; '.join(near)}: the engines count it differently"
    if at <= NEAR:
        return f"{begins}: look at what attention does (its scale, soft cap, sinks, biases)"
    return f"{begins}: look at what changes with length (windows, chunks, rope scaling)"


def lengths(config: dict[str, Any]) -> list[tuple[str, int]]:
    """(name, value) of each setting that counts tokens, parts of the config included."""
    found = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += lengths(value)
        elif type(value) is int and value > 0 and any(word in name for word in LENGTHS):
            found.append((name, value))
    return list(dict.fromkeys(found))


def layers(config: dict[str, Any], name: str) -> str:
    """The layers that a window or a chunk is of, where the config lists the kind of each layer."""
    kinds = config.get("layer_types") or []
    word = {"sliding_window": "sliding", "attention_chunk_size": "chunked"}.get(name)
    of = [str(number) for number, kind in enumerate(kinds) if word and word in str(kind)]
    return f" (layers {', '.join(of)})" if of else ""
