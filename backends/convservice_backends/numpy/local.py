"""Local connectivity without shared weights on the processor: a small product of its own at every position.

The filters are laid out position by position when the layer is prepared. For a tile of positions the
receptive fields are laid out likewise, and one stacked product multiplies each position's filters with its
field. A position's product is the same wherever tiles are cut, and for every sample; samples of a batch
follow one another so that a tile's weights, which nobody else uses, are read from memory once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import LocallyConnected
from convservice_backends.numpy.blocks import (
    ALIGNMENT,
    Reach,
    TiledPlan,
    aligned,
    carve,
    cut,
    read,
    spans,
    tile_of,
    tiles_of,
)
from convservice_backends.numpy.elementwise import activation_function, store, temporary_bytes
from convservice_backends.operators import Run, Task, Workspace
from convservice_backends.plan import BlockPlan

TILE_WEIGHTS = 1 << 18
"""Weights of a tile: what a core's own cache holds."""


class LocallyConnectedOperator:
    """A locally connected layer.

    Args:
        layer: the layer; its filters are copied, position by position.
        accumulator: the type of its sums.
    """

    def __init__(self, layer: LocallyConnected, accumulator: DType) -> None:
        self._layer = layer
        self._dtype = accumulator.numpy
        rank, groups = layer.rank, layer.groups
        self._filters_per_group = layer.out_channels // groups
        self._depth: int = layer.weight.shape[1] * math.prod(layer.kernel)
        # (out_channels, in_channels / groups, *output, *kernel) to (*output, groups, filters, elements)
        weight = layer.weight.reshape(groups, self._filters_per_group, *layer.weight.shape[1:])
        order = (*range(3, 3 + rank), 0, 1, 2, *range(3 + rank, 3 + 2 * rank))
        shape = (*layer.output_spatial, groups, self._filters_per_group, self._depth)
        self._weight = _aligned_empty(shape, self._dtype)
        np.copyto(
            self._weight.reshape(*shape[:-1], weight.shape[2], *layer.kernel),
            weight.transpose(order),
            casting="unsafe",
        )
        self._bias = self._laid_out_bias(layer)
        self._activate = activation_function(layer.activation)
        self.nbytes = self._weight.nbytes

    def _laid_out_bias(self, layer: LocallyConnected) -> NDArray[Any] | None:
        """The thresholds, of a shape that goes with (out_channels, *output)."""
        if layer.bias is None:
            return None
        bias = layer.bias.astype(self._dtype)
        return bias if bias.ndim > 1 else bias.reshape(-1, *(1 for _ in layer.kernel))

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits."""
        per_position = self._layer.out_channels * self._depth
        rows, inner = cut(max(1, TILE_WEIGHTS // per_position), out.rest)
        rows = min(rows, self._layer.output_spatial[0])
        scratch = sum(self._sizes((rows, *inner)))
        elements = self._layer.out_channels * rows * math.prod(inner)
        temporary = temporary_bytes(elements, dtype_of(self._dtype))
        tile = (out.channels, rows, *inner)
        return TiledPlan("positionwise", 1, out.rest, scratch, temporary, any_rows=True, tile=tile)

    def _column(self) -> int:
        """Elements from one field to the next: some processors' sums depend on where a field begins."""
        step = ALIGNMENT // self._dtype.itemsize
        return -(-self._depth // step) * step

    def _sizes(self, tile: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Bytes of a tile's window, fields, products and result."""
        layer, positions = self._layer, math.prod(tile)
        return (
            aligned(layer.in_channels * math.prod(spans(layer, tile)), self._dtype),
            aligned(positions * layer.groups * self._column(), self._dtype),
            aligned(positions * layer.out_channels, self._dtype),
            aligned(positions * layer.out_channels, self._dtype) + ALIGNMENT,
        )

    def compute(self, run: Run, out: NDArray[Any], workspace: Workspace) -> None:
        """Computes output rows first <= i < last, a tile a task."""
        starts = (run.first, *(0 for _ in out.shape[3:]))
        ends = (run.last, *out.shape[3:])
        tasks = [self._task(at, run, out, workspace) for at in tiles_of(tile_of(run)[1:], starts, ends)]
        workspace.run(tasks, float(out.size) * self._depth)

    def _task(self, at: tuple[slice, ...], run: Run, out: NDArray[Any], workspace: Workspace) -> Task:
        """One tile, for all samples."""

        def task(worker: int) -> None:
            scratch = workspace.scratch(worker)
            scratch = scratch[-scratch.ctypes.data % ALIGNMENT :]
            rows = slice(at[0].start - run.first, at[0].stop - run.first)
            with np.errstate(all="ignore"):
                for sample in range(out.shape[0]):
                    block = self._product(at, sample, run, scratch)
                    target: NDArray[Any] = out[sample]
                    store(block, target[(slice(None), rows, *at[1:])])

        return task

    def _product(
        self, at: tuple[slice, ...], sample: int, run: Run, scratch: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """The tile's feature maps (out_channels, *tile), in the accumulator's type."""
        layer, sizes = self._layer, tuple(part.stop - part.start for part in at)
        window_bytes, fields_bytes, products_bytes, _ = self._sizes(sizes)
        window = self._window(at, sizes, run.rows[sample : sample + 1], run, scratch)
        scratch = scratch[window_bytes:]
        fields = carve(scratch, (*sizes, layer.groups, self._column()), self._dtype)[..., : self._depth]
        for group, part in enumerate(np.split(window, layer.groups)):
            into = fields[(..., group, slice(None))].reshape(*sizes, part.shape[0], *layer.kernel)
            np.copyto(into, _fields_of(layer, part, sizes))
        scratch = scratch[fields_bytes:]
        products = carve(scratch, (*sizes, layer.groups, self._filters_per_group, 1), self._dtype)
        np.matmul(self._weight[at], fields[..., None], out=products)
        block = carve(scratch[products_bytes:], (layer.out_channels, *sizes), self._dtype)
        np.copyto(block, np.moveaxis(products.reshape(*sizes, layer.out_channels), -1, 0))
        if self._bias is not None:
            np.add(block, self._bias[(slice(None), *at)] if self._has_own_bias else self._bias, out=block)
        if self._activate is not None:
            self._activate(block)
        return block

    @property
    def _has_own_bias(self) -> bool:
        """Whether every position has a threshold of its own."""
        return self._bias is not None and self._bias.shape[1:] == self._layer.output_spatial

    def _window(
        self,
        at: tuple[slice, ...],
        sizes: tuple[int, ...],
        source: NDArray[Any],
        run: Run,
        scratch: NDArray[np.uint8],
    ) -> NDArray[Any]:
        """The input under a tile, (in_channels, *spans)."""
        layer, rest = self._layer, tuple(source.shape[3:])
        windows = layer.windows(SampleShape(source.shape[1], run.height, rest))
        reaches = [
            Reach(part.start * window.stride - window.before, span, span)
            for part, window, span in zip(at, windows, spans(layer, sizes), strict=True)
        ]
        window = carve(scratch, (1, source.shape[1], *(reach.whole for reach in reaches)), self._dtype)
        read(source, run.first_row, (run.height, *rest), reaches, window)
        channels: NDArray[Any] = window[0]
        return channels


def _fields_of(layer: LocallyConnected, window: NDArray[Any], sizes: tuple[int, ...]) -> NDArray[Any]:
    """The receptive fields of a tile's neurons, a view (*sizes, channels, *kernel)."""
    steps = window.strides[1:]
    return as_strided(
        window,
        (*sizes, window.shape[0], *layer.kernel),
        (
            *(step * s for step, s in zip(steps, layer.stride, strict=True)),
            window.strides[0],
            *(step * d for step, d in zip(steps, layer.dilation, strict=True)),
        ),
    )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A new array that begins at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    return carve(memory[-memory.ctypes.data % ALIGNMENT :], shape, dtype)
