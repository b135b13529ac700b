"""The tiles that `fourier` transforms, and what they cost beside products one by one.

Given a layer in its place, `cheapest_tile` hands on the tile to take and `pays` whether to transform at all.
Nothing here has been measured: costs are counted, in operations in float32, by datasheets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from convservice.dtypes import FLOAT32
from convservice_backends.cuda.algorithms.base import Case, ceil_div
from convservice_backends.cuda.algorithms.depthwise import Depthwise, form_of
from convservice_backends.cuda.algorithms.tensor_core import TensorCore

SQUARE_SIZES = (64, 128, 256)
"""Sizes that a tile may have along each of two axes."""

LINE_SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Columns that a tile of one row may have."""

MOST_FILTER_BYTES = 256 << 20
"""Of the transformed filters."""

FAST_DOUBLES = (80, 90, 100)
"""Architectures that compute in float64 half as fast as in float32; others 1/32 or 1/64 (CUDA C++ Programming
Guide, table "Throughput of Native Arithmetic Instructions")."""

BYTE_COST = 20.0
"""Operations in float32 in the time in which a byte of device memory moves, by the datasheet of the H100."""

DOUBLE_COST = 2.0
"""Operations in float32 in the time of one in float64."""

MARGIN = 2.0
"""How many times cheaper the transforms must be by a count that nobody has measured."""


@dataclass(frozen=True)
class Tile:
    """The inputs of one transform; powers of two."""

    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Inputs of one channel."""
        return self.rows * self.columns

    @property
    def frequencies(self) -> int:
        """Complex numbers of a channel's transform."""
        return self.rows * (self.columns // 2 + 1)

    def outputs(self, kernel: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the outputs in which nothing wraps around."""
        return (self.rows - kernel[0] + 1, self.columns - kernel[1] + 1)


def pays(case: Case) -> bool:
    """Whether transforms should be faster than products one by one; only where float64 is fast.

    `transforms_cost` must be `MARGIN` times below `products_cost`.
    """
    if case.architecture not in FAST_DOUBLES:
        return False
    return MARGIN * transforms_cost(case, cheapest_tile(case)) < products_cost(case)


def cheapest_tile(case: Case) -> Tile:
    """The tile whose outputs cost least; bits depend on it."""
    return min(tiles_for(case), key=lambda tile: transforms_cost(case, tile))


def transforms_cost(case: Case, tile: Tile) -> float:
    """Operations in float32 for one output position, all filters of it.

    A map's element is written, transformed in two passes that read and write it, and read by the next kernel:
    64 bytes of real or complex numbers, all told; its transform has 2.5 log2(n) operations (Frigo and
    Johnson, "The Design and Implementation of FFTW3", section 2). A pair of channel and filter takes 4
    operations for each element, and 6 bytes where threads own 4 filters of 2 tiles, half from the cache.
    """
    layer = case.layer
    element = 64 * BYTE_COST + 2.5 * math.log2(tile.elements) * DOUBLE_COST
    pair = 4 * DOUBLE_COST + 3 * BYTE_COST
    pairs = layer.out_channels * case.group_in
    whole = tile.elements * ((layer.in_channels + layer.out_channels) * element + pairs * pair)
    down, across = tile.outputs(kernel_of(case))
    if layer.rank == 2:  # a map is taken to be as high as it is wide; much of a tile may lie beside it
        width = case.row_elements // layer.in_channels
        down, across = min(down, width), min(across, width)
    return whole / (down * across)


def products_cost(case: Case) -> float:
    """The same for products one by one: two operations each, at the share of the peak that kernels should
    reach.

    1/2 where `depthwise` has a form for the layer's size and stride, 1/5 where only its general form fits;
    7/10 for a product of matrices, filters rounded up to 32, times what tensor cores gain: 8 for 16-bit
    types, 4 for float32 where they may round it to TF32.
    """
    layer, taps = case.layer, math.prod(case.layer.kernel)
    if Depthwise.fits(case):
        return 2 * taps * case.group_in * layer.out_channels / (0.5 if form_of(case).size else 0.2)
    filters = ceil_div(case.group_out, 32) * 32 * layer.groups
    faster = 1 if not TensorCore.fits(case) else 4 if case.given == FLOAT32 else 8
    return 2 * taps * case.group_in * filters / 0.7 / faster


def kernel_of(case: Case) -> tuple[int, int]:
    """Weights along both axes of a tile."""
    kernel = case.layer.kernel
    return (1, kernel[0]) if len(kernel) == 1 else (kernel[0], kernel[1])


def tiles_for(case: Case) -> Iterator[Tile]:
    """Tiles at least half of whose size is valid on each axis, and whose transformed filters may be kept."""
    layer, kernel = case.layer, kernel_of(case)
    pairs = layer.out_channels * case.group_in
    for rows in (1,) if layer.rank == 1 else SQUARE_SIZES:
        for columns in LINE_SIZES if layer.rank == 1 else SQUARE_SIZES:
            tile = Tile(rows, columns)
            down, across = tile.outputs(kernel)
            small = 16 * pairs * tile.frequencies <= MOST_FILTER_BYTES
            if small and 2 * down >= rows and 2 * across >= columns:
                yield tile
