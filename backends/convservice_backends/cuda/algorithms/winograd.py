"""winograd: 3x3 filters with 2.25 times fewer multiplications, where the caller allows it.

F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. Filters are
transformed here, in float64, and rounded once. It breaks rule 2 of the promise on results, and so is taken
only under `Precision.FAST`; its own bound is `error_bound`. The kernel is kernels/winograd.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import FLOAT32
from convservice.geometry import SampleShape
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms.base import Case, Problem, ceil_div, filters_as
from convservice_backends.cuda.device import Launch
from convservice_backends.cuda.source import Kernel, type_constants

Floats = NDArray[np.float64]

LARGE, SMALL = 64, 32
"""Tiles of a block: the larger reads less for each product, and should be faster where there is work for all
multiprocessors. Bits are the same."""

LARGE_FROM = 80
"""The lowest architecture whose blocks may have the 96 KiB of shared memory that the larger takes."""

DEPTH = 8
FILTERS = 32
ELEMENTS = 16

FEWEST_CHANNELS = 16
"""Channels and filters of a group below which transforms outweigh what they save."""

MOST_ALONG_Y = 65_535
"""Blocks that a grid may have along y."""

FARTHEST = 1 << 30
"""Elements of the rows around one output row stay below it: offsets within a sample have 32 bits."""

LARGEST_WEIGHT = float(np.finfo(np.float32).max) / 4
"""No element of a transformed filter is larger than 9/4 of the largest weight: beyond, it might overflow."""

FILTER_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
"""G of Lavin and Gray's section 4.1: a filter g becomes G g G^T."""


def error_bound(group_in: int, largest: Floats, weights: Floats) -> Floats:
    """How far a sum, before its threshold is added, may be from the exact one.

        16 (C + 8) u max|x| |w|_1  +  36 eta (C + 1) (1 + max|x|)

    for C channels, max|x| over the tile of 4x4 inputs and all channels, |w|_1 over the filter, u the roundoff
    and eta the smallest normal number of float32. By standard analysis (Higham, "Accuracy and Stability of
    Numerical Algorithms", section 3.1): an element of V is a sum of 4 inputs, in 2 roundings, at most 4
    max|x|; one of U has 1 rounding; C products are added in C roundings; an output is a sum of 9 elements of
    M, in 4 roundings. So the error is below (C + 7) u, and with (C + 8) u for terms of higher order, times
    the sum of |U| 4 max|x| over 9 elements and C channels; and over those 9 the sum of |U| is at most 4
    |w|_1, since the columns of |G| without its first or its last row add up to at most 2. The second term is
    for what is below the normal range.

    Args:
        group_in: C, input channels of a group.
        largest: max|x| of each output's tile; all finite.
        weights: |w|_1 of each output's filter; of a shape that goes with that of `largest`.
    """
    own = 16 * (group_in + 8) * FLOAT32.roundoff * largest * weights
    return own + 36 * FLOAT32.smallest_normal * (group_in + 1) * (1 + largest)


class Winograd:
    """Four outputs of a filter at a time, from 16 products a channel."""

    name: ClassVar[str] = "winograd"
    packing = ()
    quantum = 2

    def __init__(self, case: Case) -> None:
        self._case = case

    @classmethod
    def fits(cls, case: Case) -> bool:
        """3x3, stride 1, float32, large groups, finite filters, and only where the caller allows it."""
        layer = case.layer
        if case.precision is not Precision.FAST or case.given != FLOAT32:
            return False
        if (layer.kernel, layer.stride, layer.dilation) != ((3, 3), (1, 1), (1, 1)):
            return False
        if min(case.group_in, case.group_out) < FEWEST_CHANNELS:
            return False
        if layer.groups * ceil_div(case.group_out, FILTERS) > MOST_ALONG_Y:
            return False
        largest = float(np.abs(layer.weight).max(initial=0.0))
        held = 2 * (case.rows_under_one + 1) * case.row_elements
        return held < FARTHEST and largest <= LARGEST_WEIGHT  # not where it is NaN

    @classmethod
    def kernels(cls) -> Iterator[Kernel]:
        """One for each number of tiles."""
        for tiles in (LARGE, SMALL):
            yield _kernel(tiles)

    def pack(self) -> NDArray[Any]:
        """(groups, blocks of 32 filters, channels filled up to 8, 16, 32), and behind them as they were."""
        filters = filters_as(self._case.layer, FLOAT32)
        groups, group_out, group_in, _ = filters.shape
        blocks = ceil_div(group_out, FILTERS)
        taps = filters.astype(np.float64).reshape(groups, group_out, group_in, 3, 3)
        transformed = (FILTER_TRANSFORM @ taps @ FILTER_TRANSFORM.T).reshape(*filters.shape[:3], ELEMENTS)
        packed = np.zeros((groups, blocks * FILTERS, ceil_div(group_in, DEPTH) * DEPTH, ELEMENTS), np.float32)
        packed[:, :group_out, :group_in] = transformed
        parts = packed.reshape(groups, blocks, FILTERS, -1, ELEMENTS).transpose(0, 1, 3, 4, 2)
        return np.concatenate([parts.ravel(), filters.ravel()])

    def scratch_bytes(self, sample: SampleShape, rows: int, samples: int) -> int:
        """None: transformed tiles stay in shared memory."""
        return 0

    def launches(self, problem: Problem) -> Iterator[Launch]:
        """Tiles along x, blocks of filters along y; fewer tiles a block where processors would stay idle."""
        arguments = problem.arguments
        down, across = (ceil_div(axis.count, 2) for axis in arguments.axes[1:])
        tiles = arguments.samples * down * across
        along_y = arguments.groups * ceil_div(arguments.group_out, FILTERS)
        full = ceil_div(tiles, LARGE) * along_y >= problem.processors
        size = LARGE if full and self._case.architecture >= LARGE_FROM else SMALL
        yield Launch(_kernel(size), (ceil_div(tiles, size), along_y, 1), arguments, problem.holds)


def _kernel(tiles: int) -> Kernel:
    stages = 2 * DEPTH * ELEMENTS * (FILTERS + tiles) * FLOAT32.itemsize
    constants = (*type_constants(FLOAT32, FLOAT32), ("TILES", tiles), ("STAGES_BYTES", stages))
    label = f"float32_tiles{tiles}"
    minimum = LARGE_FROM if tiles == LARGE else 75
    return Kernel("winograd", label, DEPTH * tiles, constants, dynamic_bytes=stages, minimum=minimum)
