"""When two computations of one model agree: the bounds of the null test and of recomputed rows."""

BOUND = 0.02
"""Nats of mean KL. Two engines differ by up to 1e-4, and the codec adds 6e-5."""
SURE = 4
"""Standard errors that chance does not reach."""


def limit(bound: float, noise: float = 0.0) -> float:
    """Largest mean, in nats, that agrees: `bound`, and chance where it has a standard error."""
    return bound + SURE * noise
