"""Full connectivity on the processor: products of the weights with one sample after another.

The vector is taken in as its rows come, before it was ever laid out: the weights' columns say where each
value belongs. A small one is one block; a large one is cut into blocks of rows, and their products are added
in order. Every product is of a matrix with one sample's column, of the same shape for every sample, so that a
batch changes no bit; a few samples' columns stand side by side only so that the weights that lie in the
processor's cache serve them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import Linear
from convservice_backends.numpy.blocks import carve
from convservice_backends.numpy.elementwise import activation_function, store, temporary_bytes
from convservice_backends.operators import Run, Task, Workspace
from convservice_backends.plan import BlockPlan

BLOCK_ELEMENTS = 1 << 18
"""Elements of a vector that are taken in together: what is held of its rows."""

TILE_ELEMENTS = 1 << 18
"""Weights of a product: they stay in a core's own cache while it serves the samples."""

TILE_COLUMNS = 1 << 12
"""Most columns of the weights in one product."""

COLUMN_ALIGNMENT = 16
"""Elements to whose multiples a sample's column is aligned: some processors' sums depend on where it lies."""

STACK_BYTES = 1 << 20
"""What the columns of samples side by side may take, where they are several."""


class _Tile(NamedTuple):
    """Columns of the weights that are multiplied at once, by channels, rows and positions of the map that
    they stand for, and where their values stand in a sample's column."""

    channels: slice
    rows: slice
    positions: slice
    column: slice


class LinearOperator:
    """A fully connected layer.

    Args:
        layer: the layer; its weights are used where they are when they have the accumulator's type.
        accumulator: the type of its sums.
    """

    def __init__(self, layer: Linear, accumulator: DType) -> None:
        self._dtype = accumulator.numpy
        self._weight = layer.weight.astype(self._dtype, copy=False)
        self._bias = None if layer.bias is None else layer.bias.astype(self._dtype)
        self._activate = activation_function(layer.activation)
        self.nbytes = 0 if self._weight is layer.weight else self._weight.nbytes

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """All rows of a small vector, else as many as are worth holding."""
        features = self._weight.shape[1]
        rows = features // given.row_elements
        if features > BLOCK_ELEMENTS:
            rows = max(1, BLOCK_ELEMENTS // given.row_elements)
        column = _padded(rows * given.row_elements) * self._dtype.itemsize
        tile = TILE_ELEMENTS * self._dtype.itemsize  # copied, where the columns are not side by side
        sums = temporary_bytes(2 * max(out.channels, TILE_ELEMENTS), dtype_of(self._dtype))
        return BlockPlan("blockwise", rows, out.rest, tile, max(STACK_BYTES, column) + sums)

    def sums(self, given: SampleShape, out: SampleShape) -> tuple[tuple[int, ...], DType]:
        """One number per neuron."""
        return (out.channels,), dtype_of(self._dtype)

    def accumulate(self, run: Run, sums: NDArray[Any], out: NDArray[Any], workspace: Workspace) -> None:
        """Takes in input rows first <= i < last, a block after the other."""
        if run.first == 0:
            sums.fill(0)
        samples, channels, _, *rest = run.rows.shape
        neurons, positions = self._weight.shape[0], math.prod(rest)
        for first in range(run.first, run.last, run.blocks.rows):
            last = min(first + run.blocks.rows, run.last)
            size = channels * (last - first) * positions
            if last - first == run.known_height:  # the map lies in the order of the weights' columns
                weight = self._weight.reshape(neurons, 1, 1, size)
                tiles = list(_tiles(1, 0, 1, size))
            else:
                weight = self._weight.reshape(neurons, channels, run.known_height, positions)
                tiles = list(_tiles(channels, first, last, positions))
            stack = min(STACK_BYTES // (_padded(size) * self._dtype.itemsize), TILE_ELEMENTS // neurons)
            stack = max(1, stack)
            rows = run.rows[:, :, first - run.first_row : last - run.first_row]
            for sample in range(0, samples, stack):
                some = slice(sample, min(sample + stack, samples))
                columns = np.empty((some.stop - some.start, _padded(size)), self._dtype)
                laid_out = columns[:, :size].reshape(-1, *rows.shape[1:])
                with np.errstate(all="ignore"):
                    np.copyto(laid_out, rows[some], casting="unsafe")
                tasks = [
                    self._task(weight, tiles, part, columns=columns, sums=sums[some], workspace=workspace)
                    for part in self._parts(tiles)
                ]
                workspace.run(tasks, float(size) * sums[some].size)

    def _parts(self, tiles: list[_Tile]) -> list[slice]:
        """The neurons that one task computes."""
        neurons = self._weight.shape[0]
        widest = max(tile.column.stop - tile.column.start for tile in tiles)
        step = max(1, min(neurons, TILE_ELEMENTS // widest))
        return [slice(first, min(first + step, neurons)) for first in range(0, neurons, step)]

    @staticmethod
    def _task(
        weight: NDArray[Any],
        tiles: list[_Tile],
        neurons: slice,
        *,
        columns: NDArray[Any],
        sums: NDArray[Any],
        workspace: Workspace,
    ) -> Task:
        def task(worker: int) -> None:
            count = neurons.stop - neurons.start
            with np.errstate(all="ignore"):
                for tile in tiles:
                    width = tile.column.stop - tile.column.start
                    part = weight[neurons, tile.channels, tile.rows, tile.positions]
                    if not _is_matrix(part):
                        copied = carve(workspace.scratch(worker), part.shape, part.dtype)
                        np.copyto(copied, part)
                        part = copied
                    matrix = part.reshape(count, width)
                    products = np.matmul(matrix, columns[:, tile.column, None])
                    np.add(sums[:, neurons], products[:, :, 0], out=sums[:, neurons])

        return task

    def finish(
        self, height: int, given: SampleShape, sums: NDArray[Any], out: NDArray[Any], workspace: Workspace
    ) -> None:
        """Threshold, activation, rounding."""
        workspace.run([], 0)
        with np.errstate(all="ignore"):
            for values, into in zip(sums, out.reshape(sums.shape), strict=True):
                if self._bias is not None:
                    np.add(values, self._bias, out=values)
                if self._activate is not None:
                    self._activate(values)
                store(values, into)


def _padded(size: int) -> int:
    return -(-size // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def _tiles(channels: int, first: int, last: int, positions: int) -> Iterator[_Tile]:
    """The columns of the weights for rows first <= i < last, as tiles of at most `TILE_COLUMNS`."""
    rows = last - first
    per_channel = rows * positions
    if per_channel <= TILE_COLUMNS:
        step = TILE_COLUMNS // per_channel
        for channel in range(0, channels, step):
            stop = min(channel + step, channels)
            column = slice(channel * per_channel, stop * per_channel)
            yield _Tile(slice(channel, stop), slice(first, last), slice(None), column)
        return
    for channel in range(channels):
        for row in range(first, last):
            for position in range(0, positions, TILE_COLUMNS):
                stop = min(position + TILE_COLUMNS, positions)
                begin = (channel * rows + row - first) * positions
                column = slice(begin + position, begin + stop)
                yield _Tile(slice(channel, channel + 1), slice(row, row + 1), slice(position, stop), column)


def _is_matrix(part: NDArray[Any]) -> bool:
    """Whether the elements of each neuron lie side by side."""
    return bool(part[0].flags.c_contiguous)
