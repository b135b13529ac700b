"""The worked example: a 5x5 input, a 3x3 filter, nine neurons, and what they give.

Stride 1, no padding, threshold 0, linear activation. All numbers are small integers, so that every
backend and dtype gives the feature map exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INPUT: NDArray[np.float32] = np.array(
    [
        [3, 3, 2, 1, 0],
        [0, 0, 1, 3, 1],
        [3, 1, 2, 2, 3],
        [2, 0, 0, 2, 2],
        [2, 0, 0, 0, 1],
    ],
    dtype=np.float32,
)
"""Shape (5, 5)."""

WEIGHT: NDArray[np.float32] = np.array([[0, 1, 2], [2, 2, 0], [0, 1, 2]], dtype=np.float32)
"""Shape (3, 3): one filter over one channel."""

FEATURE_MAP: NDArray[np.float32] = np.array([[12, 12, 17], [10, 17, 19], [9, 6, 14]], dtype=np.float32)
"""Shape (3, 3): neuron (i, j) looks at the rows i to i + 2 and the columns j to j + 2."""
