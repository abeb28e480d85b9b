"""Types that several folders share."""

from typing import Any

import numpy as np
import numpy.typing as npt

Json = dict[str, Any]

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
