"""implicit_gemm: a convolution as a product of matrices, of which only the filters are ever written out.

Given a layer, it packs the filters in the order in which the kernel sums, and launches one product for all
groups, samples and positions; where one sample alone makes a small product of long sums, the sums are split
and a second pass adds the parts.

What fixes the bits: the order of the terms (`by_taps`, from layer and types) and the splits (`splits_of`,
from the layer and the width of its map: the height, which may not be known yet, is taken to be alike). Tiles,
gathers and grids may follow the launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from convservice.geometry import PaddingMode, SampleShape
from convservice_backends.cuda.algorithms.base import Case, Problem, ceil_div, filters_as, square_positions
from convservice_backends.cuda.algorithms.gemm_tiles import (
    DEPTH,
    SHORT_TERMS,
    Gather,
    Product,
    Tile,
    choose_tile,
    every_kernel,
    gathers_of,
    packed_filters,
    product_kernel,
    reduce_kernel,
    tiles_of,
)
from convservice_backends.cuda.arguments import ConvArguments
from convservice_backends.cuda.device import Launch
from convservice_backends.cuda.source import Kernel

MOST_TAPS = 64
"""Weights of a filter on one channel that `Gather.TAPS` has bits for; `Gather.SHORT` has one less."""

FEWEST_SPLIT_TERMS = 512
"""Terms of a part of a split sum: so many that writing and reading the parts, 8 bytes for each of them and
each output, should cost no more than an eighth of the products even where a batch would have filled the
device without splits (by bandwidth and peak of the datasheets)."""

MOST_SPLITS = 8
"""Bounds the working memory: so many times the map."""

FULL = 128
"""Blocks of 64 x 64 outputs that keep a device busy: one sample that has fewer is split. One number for all
devices."""

MOST_ELEMENTS = 1 << 30
"""Bound of a channel's rows: kernels count elements within a channel with 32 bits, and a ring buffer holds
about twice the rows under one window."""

MOST_BLOCKS = (1 << 31) - 1
"""Blocks that a grid may have along x."""


class ImplicitGemm:
    """The convolution as a matrix product, its second matrix read from the rows where they lie.

    Args:
        case: the layer in its place.
        tile: one to take wherever there is a kernel with it; for tests, since no bit depends on it.
    """

    name: ClassVar[str] = "implicit_gemm"
    packing = ()
    quantum = 1

    def __init__(self, case: Case, tile: Tile | None = None) -> None:
        self._case = case
        self._tile = tile
        self._terms = ceil_div(case.group_in * math.prod(case.layer.kernel), DEPTH) * DEPTH

    @classmethod
    def fits(cls, case: Case) -> bool:
        """Where twice a channel's rows under one window, and two more, are below `MOST_ELEMENTS` elements."""
        return 2 * (case.row_elements // case.layer.in_channels) * (case.rows_under_one + 2) < MOST_ELEMENTS

    @classmethod
    def kernels(cls) -> Iterator[Kernel]:
        """Each gather with each tile, for each pair of types; and the second pass."""
        return every_kernel()

    @cached_property
    def by_taps(self) -> bool:
        """Whether the terms go through all channels weight by weight; else through all weights by channel."""
        case = self._case
        zeros = case.layer.padding_mode == PaddingMode.ZEROS
        taps = math.prod(case.layer.kernel)
        return (
            Gather.TAPS in gathers_of(case.given)
            and zeros
            and taps <= MOST_TAPS
            and case.group_in % DEPTH == 0
        )

    def pack(self) -> NDArray[Any]:
        """(groups, terms, filters of a group) in the type of the sums, flat, zeros where there is neither.

        Terms and filters are rounded up, see gemm_tiles. Where the terms go by channels, the kernel's table
        of the terms follows: for each (channel, place on three axes), as int32; (-1, 0, 0, 0) after the last.
        """
        case = self._case
        filters = filters_as(case.layer, case.sums).transpose(0, 3, 2, 1)  # groups, taps, channels, filters
        if not self.by_taps:
            filters = filters.transpose(0, 2, 1, 3)
        terms = filters.shape[1] * filters.shape[2]
        width = packed_filters(case.given, case.group_out)
        packed = np.zeros((case.layer.groups, self._terms, width), case.sums.numpy)
        packed[:, :terms, : case.group_out] = filters.reshape(case.layer.groups, terms, case.group_out)
        if self.by_taps:
            return packed.reshape(-1)
        return np.concatenate([packed.reshape(-1), self._table().reshape(-1).view(case.sums.numpy)])

    def _table(self) -> NDArray[np.int32]:
        layer = self._case.layer
        missing = 3 - layer.rank
        kernel, dilation = (1,) * missing + layer.kernel, (1,) * missing + layer.dilation
        places = np.indices((self._case.group_in, *kernel)).reshape(4, -1).T
        table = np.zeros((self._terms, 4), np.int32)
        table[:, 0] = -1
        table[: len(places)] = places * np.array([1, *dilation])
        return table

    def splits_of(self, sample: SampleShape) -> tuple[int, int]:
        """Parts of each sum, and the terms of each but the last; (1, all) in 1-D.

        A map is taken to be as high as it is wide, so that a sum is the same whether or not the height is
        told beforehand. One much higher is split without need, which costs little: `FEWEST_SPLIT_TERMS`.
        """
        case = self._case
        blocks = ceil_div(case.group_out, 64) * ceil_div(square_positions(sample), 64) * case.layer.groups
        splits = min(ceil_div(FULL, blocks), self._terms // FEWEST_SPLIT_TERMS, MOST_SPLITS)
        depth = ceil_div(self._terms, max(1, splits) * DEPTH) * DEPTH
        return ceil_div(self._terms, depth), depth

    def scratch_bytes(self, sample: SampleShape, rows: int, samples: int) -> int:
        """The parts of the split sums; none where they are not split."""
        splits, _ = self.splits_of(sample)
        if splits == 1:
            return 0
        return splits * samples * rows * sample.row_elements * self._case.sums.itemsize

    def launches(self, problem: Problem) -> Iterator[Launch]:
        """One product, or one of parts and the pass that adds them."""
        case, a, holds = self._case, problem.arguments, problem.holds
        a.splits, a.split_depth = self.splits_of(problem.sample)
        a.filter_stride = packed_filters(case.given, case.group_out)
        if a.splits > 1 and problem.scratch is not None:
            a.scratch = problem.scratch.address
            holds = (*holds, problem.scratch)
        gather = self._gather(a)
        outputs = a.samples * a.positions * a.groups * a.group_out
        tile, blocks = self._tile_of(problem, gather)
        kernel = product_kernel(case.given, problem.out, gather, tile)
        yield Launch(kernel, (blocks, a.splits, 1), a, holds)
        if a.splits > 1:
            second = reduce_kernel(case.given, problem.out)
            yield Launch(second, (min(ceil_div(outputs, second.threads), MOST_BLOCKS), 1, 1), a, holds)

    def _tile_of(self, problem: Problem, gather: Gather) -> tuple[Tile, int]:
        """The tile of a launch, and how many there are along x."""
        a = problem.arguments
        product = Product(a.group_out, a.samples * a.positions, a.groups * a.splits)
        tiles = [tile for tile in tiles_of(self._case.given, gather) if a.filter_stride % tile.filters == 0]
        chosen = [self._tile] if self._tile in tiles else tiles
        tile = choose_tile(chosen, product, problem.processors)
        return tile, product.blocks(tile) // a.splits

    def _gather(self, a: ConvArguments) -> Gather:
        """How the kernel reads: one of those that have the order of the packed terms."""
        gathers = gathers_of(self._case.given)
        if self.by_taps:
            wide = _contiguous(a) and _aligned(a, self._case.given.itemsize)
            return Gather.VECTORS if wide else Gather.TAPS
        listed = self._terms <= SHORT_TERMS and a.taps < MOST_TAPS and a.padding == 0
        near = a.group_in * a.input_channel < 1 << 31  # places in the list have 32 bits
        return Gather.SHORT if listed and near and Gather.SHORT in gathers else Gather.TABLE


def _contiguous(a: ConvArguments) -> bool:
    """Whether neighbouring positions look at neighbouring elements, one each, and none at padding."""
    whole = 1
    for axis in reversed(a.axes):
        inside = axis.low <= axis.start and axis.start + axis.count <= axis.high
        neighbours = axis.count == 1 or axis.step == whole
        if axis.kernel != 1 or axis.stride != 1 or not inside or not neighbours:
            return False
        whole *= axis.count
    return True


def _aligned(a: ConvArguments, itemsize: int) -> bool:
    """Whether every run of 16 bytes of positions lies in one sample, at a multiple of 16 bytes."""
    first = sum(axis.start * axis.step for axis in a.axes)
    places = (a.positions, a.input_sample, a.input_channel, first)
    return a.input % 16 == 0 and all(place * itemsize % 16 == 0 for place in places)
