"""What learning and reading the tables of version 3 share: kernels, and the order of lists."""

from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt

from storage.codec.v1 import Ranks
from storage.errors import StorageError
from storage.targets import Int64s
from storage.topk import Int32s

Integers = npt.NDArray[np.integer]


@cache
def compiled() -> ModuleType:
    """The module storage.codec.v3_kernels. Raises StorageError without numba."""
    try:
        from storage.codec import v3_kernels as kernels
    except ImportError as error:
        raise StorageError(
            f"payloads of version 3 need numba ({error}): pip install numba, or dump with codec: v1"
        ) from None
    return kernels


def list_order(starts: Int32s, listed: Int32s, kinds: Integers, ranks: Ranks) -> Int64s:
    """[n] the order in which a token's successors are asked: by descending kind, then by rank."""
    token = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return np.asarray(np.lexsort((ranks.rank_of[listed], -kinds.astype(np.int64), token)))
