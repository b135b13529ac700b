"""Convolution as blocked im2col and GEMM.

For each block the receptive fields of its neurons are laid out as the columns of a matrix; the filters are
the rows of another, and one product gives the block of every feature map. The block's shape follows from
the layer and the sample's shape without its height, blocks lie at absolute multiples of it, and a short
last block is filled up with zeros, so that a neuron always has the same column in a product of the same
shape: BLAS changes last bits otherwise. No product holds columns of two samples; small samples go as a
stack of equal products.

The method is Chellapilla, Puri, Simard: High Performance Convolutional Neural Networks for Document
Processing (2006), section 2.3.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice_backends.numpy.blocks import Block, aligned, blocks_of, carve, cut, gather, spans
from convservice_backends.numpy.elementwise import activation_function, store, temporary_bytes
from convservice_backends.operators import Run, Task, Workspace
from convservice_backends.plan import BlockPlan

COLUMNS_BYTES = 1 << 20
"""Preferred size of a block's columns: written once and read once, best from a core's own cache."""
FEWEST_COLUMNS = 192
"""Below this a product spends its time on packing the filters."""
MOST_COLUMNS_BYTES = 16 << 20
"""What the columns may take for the sake of `FEWEST_COLUMNS`."""
TILE_WORK = 32_000_000
"""Multiply-adds worth a worker of its own: a block's filters are cut into tiles of about so much."""
MOST_HELD_BYTES = 16 << 20
"""What the input rows under a block may take, gaps between far apart windows included, if it has several
output rows."""
MOST_WORK = 2_000_000_000
"""Multiply-adds of a block at most: cancel and deadline are checked between blocks."""


class Im2colOperator:
    """A convolution by im2col and GEMM.

    Args:
        layer: the convolution; its filters are used where they are when they have the accumulator's type.
        accumulator: the type of its sums.
    """

    def __init__(self, layer: Conv, accumulator: DType) -> None:
        self._layer = layer
        self._dtype = accumulator.numpy
        filters = layer.weight.astype(self._dtype, copy=False)
        groups, channels = layer.groups, layer.out_channels // layer.groups
        self._filters = filters.reshape(groups, channels, math.prod(filters.shape[1:]))
        self._bias = (
            None if layer.bias is None else layer.bias.astype(self._dtype).reshape(groups, channels, 1)
        )
        self._activate = activation_function(layer.activation)
        # The input is its own matrix of columns where every neuron looks at the one position it stands on.
        self._is_pointwise = math.prod(layer.kernel) == 1 and math.prod(layer.stride) == 1
        self.nbytes = 0 if filters is layer.weight else filters.nbytes

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """As many whole rows as the columns' size allows, else a part of a row."""
        depth = self._layer.in_channels * math.prod(self._layer.kernel)
        column_bytes = depth * self._dtype.itemsize
        columns = max(FEWEST_COLUMNS, COLUMNS_BYTES // column_bytes)
        work = self._layer.out_channels * self._filters.shape[2]
        columns = max(1, min(columns, MOST_COLUMNS_BYTES // column_bytes, MOST_WORK // work))
        rows, inner = cut(columns, out.rest)
        most_held = MOST_HELD_BYTES // (given.row_elements * self._dtype.itemsize)
        rows = max(
            1, min(rows, (most_held - spans(self._layer, (1, *inner))[0]) // self._layer.stride[0] + 1)
        )
        elements = self._layer.out_channels * rows * math.prod(inner)
        scratch = sum(self._sizes((rows, *inner)))
        return BlockPlan("im2col", rows, inner, scratch, temporary_bytes(elements, dtype_of(self._dtype)))

    def _sizes(self, block: tuple[int, ...]) -> tuple[int, int, int]:
        """Bytes of a block's window, columns and result, for one sample."""
        layer, columns = self._layer, math.prod(block)
        depth = layer.in_channels * math.prod(layer.kernel)
        return (
            aligned(layer.in_channels * math.prod(spans(layer, block)), self._dtype),
            aligned(depth * columns, self._dtype),
            aligned(layer.out_channels * columns, self._dtype),
        )

    def compute(self, run: Run, out: NDArray[Any], workspace: Workspace) -> None:
        """Computes output rows first <= i < last, a block a task; small samples several to a block."""
        sizes = (run.blocks.rows, *run.blocks.inner)
        stack = max(1, run.blocks.scratch_bytes // sum(self._sizes(sizes)))
        blocks, tiles = list(blocks_of(run, out.shape, stack)), self._tiles(math.prod(sizes))
        # Tiles of one block share its columns; with too few blocks for the workers each lays out its own.
        shares = [tiles] if len(blocks) >= workspace.workers else [[tile] for tile in tiles]
        tasks = [self._task(block, share, run, out, workspace) for block in blocks for share in shares]
        workspace.run(tasks, float(out.size) * self._filters.shape[2])

    def _tiles(self, columns: int) -> list[slice]:
        """The filters of a block's products: all of a group, or an even part of them."""
        groups, channels, depth = self._filters.shape
        parts = min(channels, channels * depth * columns // TILE_WORK) if groups == 1 else 1
        size = -(-channels // max(1, parts))
        return [slice(first, min(first + size, channels)) for first in range(0, channels, size)]

    def _task(
        self, block: Block, tiles: list[slice], run: Run, out: NDArray[Any], workspace: Workspace
    ) -> Task:
        inside = (slice(None), *(slice(0, n) for n in block.inside))
        span = slice(tiles[0].start, tiles[-1].stop) if self._layer.groups == 1 else slice(None)

        def task(worker: int) -> None:
            with np.errstate(all="ignore"):
                result = self._product(block, tiles, run, workspace.scratch(worker))
                store(result[(slice(None), span)][(slice(None), *inside)], block.target(run, out)[:, span])

        return task

    def _product(
        self, block: Block, tiles: list[slice], run: Run, scratch: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """The block's feature maps (samples, out_channels, *block) in the accumulator's type, as far as
        the tiles of filters go."""
        layer, sizes = self._layer, (run.blocks.rows, *run.blocks.inner)
        groups, channels, depth = self._filters.shape
        samples, count = block.samples.stop - block.samples.start, math.prod(sizes)
        window_bytes, columns_bytes, _ = (samples * size for size in self._sizes(sizes))
        window = gather(layer, block, run, scratch, self._dtype, sizes=sizes)
        if self._is_pointwise and count > 1:  # a lone column would be read with the rows' own step
            columns = window.reshape(samples, groups, depth, count)
        else:
            columns = carve(scratch[window_bytes:], (samples, groups, depth, count), self._dtype)
            fields = _receptive_fields(layer, window, sizes)
            np.copyto(columns.reshape(fields.shape), fields)
        result = carve(
            scratch[window_bytes + columns_bytes :], (samples, groups, channels, count), self._dtype
        )
        for tile in tiles:
            sums = result[:, :, tile]
            np.matmul(self._filters[:, tile], columns, out=sums)
            if self._bias is not None:
                np.add(sums, self._bias[:, tile], out=sums)
            if self._activate is not None:
                self._activate(sums)
        return result.reshape(samples, groups * channels, *sizes)


def _receptive_fields(layer: Conv, window: NDArray[Any], sizes: tuple[int, ...]) -> NDArray[Any]:
    """The receptive fields of a block's neurons, a view (samples, channels, *kernel, *sizes)."""
    steps = window.strides[2:]
    return as_strided(
        window,
        (*window.shape[:2], *layer.kernel, *sizes),
        (
            *window.strides[:2],
            *(step * d for step, d in zip(steps, layer.dilation, strict=True)),
            *(step * s for step, s in zip(steps, layer.stride, strict=True)),
        ),
    )
