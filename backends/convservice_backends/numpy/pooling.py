"""Max and average pooling on the processor: axis after axis, at a cost that the window hardly changes.

The window of a tile is gathered, padding included, and reduced along each axis by itself. A long window is
put together from windows of 1, 2, 4, ... positions (the largest of overlapping ones; the sum of those that
make up its length in binary), so that an output costs the logarithm of the window's size. A neuron's sum is
thereby of its own values alone, in an order that the layer fixes: running sums, which carry a NaN or a
rounding from one neuron to the next, are not used. Hence tiles may be cut anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType, dtype_of
from convservice.geometry import AxisWindow, SampleShape
from convservice.layers import AvgPool, MaxPool
from convservice_backends.numpy.blocks import Reach, TiledPlan, aligned, carve, read, tile_of, tiles_of
from convservice_backends.numpy.elementwise import store, temporary_bytes
from convservice_backends.operators import Run, Task, Workspace
from convservice_backends.plan import BlockPlan

TILE_ELEMENTS = 1 << 16
"""Input elements of a tile: two copies fit a core's own cache."""

OVERLAP = 4
"""A tile is at least this share of its window high and wide, so that tiles do not mostly read what their
neighbours read."""

MOST_TAPS = 64
"""Longest window that is gone through position by position: each costs a call, for however few windows."""

Combine = Callable[..., NDArray[Any]]
"""np.maximum or np.add."""


class PoolOperator:
    """Max or average pooling.

    Args:
        layer: the layer.
        accumulator: the type it computes in.
    """

    nbytes = 0

    def __init__(self, layer: MaxPool | AvgPool, accumulator: DType) -> None:
        self._layer = layer
        self._dtype = accumulator.numpy
        self._is_max = isinstance(layer, MaxPool)

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits; under a tall window a run begins every few rows only, so that the
        window's rows are not gone through again for each."""
        windows = self._layer.windows(given)
        fewest = [max(1, -(-window.extent // (OVERLAP * window.stride))) for window in windows]
        tile = _tile(windows, fewest, out)
        elements = tile[0] * math.prod(w.reach(n) for w, n in zip(windows, tile[1:], strict=True))
        scratch = 3 * aligned(elements, self._dtype)
        # The numbers of positions to divide by, also in float64; a mask of NaN, and what rounding takes.
        temporary = temporary_bytes(elements, dtype_of(self._dtype))
        temporary += 8 * (3 * math.prod(tile[1:]) + 4 * sum(tile[1:]))
        return TiledPlan("separable", fewest[0], out.rest, scratch, temporary, any_rows=True, tile=tile)

    def compute(self, run: Run, out: NDArray[Any], workspace: Workspace) -> None:
        """Computes output rows first <= i < last, a tile a task; of small maps several to a
        tile."""
        given = SampleShape(run.rows.shape[1], run.height, tuple(run.rows.shape[3:]))
        windows = self._layer.windows(given)
        channels, *sizes = map(min, tile_of(run), out.shape[1:])
        elements = math.prod(w.reach(n) for w, n in zip(windows, sizes, strict=True))
        fitting = max(channels, run.blocks.scratch_bytes // (3 * aligned(elements, self._dtype)))
        channels = min(fitting, out.shape[1])
        tile = (max(1, fitting // channels), channels, *sizes)
        starts = (0, 0, run.first, *(0 for _ in given.rest))
        ends = (out.shape[0], out.shape[1], run.last, *out.shape[3:])
        tasks = [self._task(at, windows, run, out, workspace) for at in tiles_of(tile, starts, ends)]
        work = float(out.size) * sum(window.stride + math.log2(window.kernel) for window in windows)
        workspace.run(tasks, work)

    def _task(
        self,
        at: tuple[slice, ...],
        windows: Sequence[AxisWindow],
        run: Run,
        out: NDArray[Any],
        workspace: Workspace,
    ) -> Task:
        """One tile: slices of samples, channels, and output positions along each axis."""

        def task(worker: int) -> None:
            with np.errstate(all="ignore"):
                block = self._reduced(at, windows, run, workspace.scratch(worker))
                self._finish(block, at[2:], windows, (run.height, *run.rows.shape[3:]))
                rows = slice(at[2].start - run.first, at[2].stop - run.first)
                store(block, out[(*at[:2], rows, *at[3:])])

        return task

    def _reduced(
        self, at: tuple[slice, ...], windows: Sequence[AxisWindow], run: Run, scratch: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """The largest values, or the sums, of a tile: (samples, channels, *sizes), contiguous."""
        source = run.rows[at[:2]]
        axes: list[Reach] = []
        for part, window in zip(at[2:], windows, strict=True):
            start, stop = window.span(part.start, part.stop)
            axes.append(Reach(start, stop - start, stop - start))
        shape = (*source.shape[:2], *(axis.whole for axis in axes))
        buffers = _Buffers(scratch, math.prod(shape), self._dtype)
        values = buffers.take(shape)
        fill = -np.inf if self._is_max else 0.0
        read(source, run.first_row, (run.height, *run.rows.shape[3:]), axes, values, fill=fill)
        combine: Combine = np.maximum if self._is_max else np.add
        for axis, (part, window) in enumerate(zip(at[2:], windows, strict=True)):
            size = part.stop - part.start
            values = _along(values, 2 + axis, window, size, combine=combine, buffers=buffers)
        return buffers.packed(values)

    def _finish(
        self,
        block: NDArray[Any],
        at: Sequence[slice],
        windows: Sequence[AxisWindow],
        sizes: Sequence[int | None],
    ) -> None:
        if isinstance(self._layer, MaxPool):
            same_zeros_and_nans(block)
            return
        counts = [
            _counts(window, part, size, real=not self._layer.count_include_pad)
            for window, part, size in zip(windows, at, sizes, strict=True)
        ]
        positions = np.ones((1,) * block.ndim, np.float64)
        for axis, count in enumerate(counts):
            positions = positions * count.reshape((-1, *(1 for _ in counts[axis + 1 :])))
        np.divide(block, positions.astype(self._dtype), out=block)


def same_zeros_and_nans(block: NDArray[Any]) -> None:
    """Makes every zero +0 and every NaN the same one: which of several a maximum hands back depends on where
    the vector unit's lanes lie."""
    np.add(block, 0, out=block)
    if block.size and np.isnan(np.max(block)):
        np.copyto(block, np.nan, where=np.isnan(block))


def _counts(window: AxisWindow, at: slice, size: int | None, *, real: bool) -> NDArray[np.float64]:
    """Positions of each window that count: real ones, or those up to the end of the padding."""
    starts = np.arange(at.start, at.stop, dtype=np.float64) * window.stride - window.before
    end = np.inf if size is None else size if real else size + window.after
    stops = np.minimum(starts + window.extent, end)
    counts: NDArray[np.float64] = stops - (np.maximum(starts, 0) if real else starts)
    return counts


def _tile(windows: Sequence[AxisWindow], fewest: Sequence[int], out: SampleShape) -> tuple[int, ...]:
    """Channels, rows and sizes along the other axes of a tile; the height plays no part."""
    sizes = list(fewest)
    for axis, most in reversed(list(enumerate((None, *out.rest)))):
        window = windows[axis]
        others = math.prod(
            w.reach(n) for i, (w, n) in enumerate(zip(windows, sizes, strict=True)) if i != axis
        )
        fits = (TILE_ELEMENTS // others - window.extent) // window.stride + 1
        grown = max(sizes[axis], fits)
        sizes[axis] = grown if most is None else min(grown, most)
    elements = math.prod(window.reach(size) for window, size in zip(windows, sizes, strict=True))
    return (max(1, min(out.channels, TILE_ELEMENTS // elements)), *sizes)


class _Buffers:
    """Three arrays of one size, to compute from one into another."""

    def __init__(self, scratch: NDArray[np.uint8], elements: int, dtype: np.dtype[Any]) -> None:
        size = aligned(elements, dtype)
        self._parts = [carve(scratch[at * size :], (elements,), dtype) for at in range(3)]
        self._next = 0

    def take(self, shape: tuple[int, ...], *used: NDArray[Any]) -> NDArray[Any]:
        """One of that shape that holds none of those in use, two at most."""
        for part in self._parts:
            if not any(np.may_share_memory(part, other) for other in used):
                return part[: math.prod(shape)].reshape(shape)
        raise AssertionError("of three buffers at most two are in use")

    def packed(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values, contiguous."""
        if values.flags.c_contiguous:
            return values
        out = self.take(values.shape, values)
        np.copyto(out, values)
        return out


def _along(
    values: NDArray[Any], axis: int, window: AxisWindow, count: int, *, combine: Combine, buffers: _Buffers
) -> NDArray[Any]:
    """`values` reduced along one axis to `count` windows."""
    kernel, stride, dilation = window.kernel, window.stride, window.dilation

    def every(source: NDArray[Any], first: int) -> NDArray[Any]:
        """What stands `first` positions behind the beginning of each window."""
        start = first * dilation
        return _part(source, axis, slice(start, start + (count - 1) * stride + 1, stride))

    if kernel == 1:
        return every(values, 0)
    shape = list(values.shape)
    shape[axis] = count
    if kernel <= min(MOST_TAPS, 2 + stride * math.log2(kernel)):
        out = combine(every(values, 0), every(values, 1), out=buffers.take(tuple(shape), values))
        for tap in range(2, kernel):
            combine(out, every(values, tap), out=out)
        return out
    return _doubled(values, axis, window, tuple(shape), combine=combine, every=every, buffers=buffers)


def _doubled(
    values: NDArray[Any],
    axis: int,
    window: AxisWindow,
    shape: tuple[int, ...],
    *,
    combine: Combine,
    every: Callable[[NDArray[Any], int], NDArray[Any]],
    buffers: _Buffers,
) -> NDArray[Any]:
    """A long window from those of 1, 2, 4, ... positions."""
    kernel, overlap = window.kernel, combine is np.maximum
    out: NDArray[Any] | None = None
    length, done = 1, 0
    while True:
        if not overlap and kernel & length:
            if out is None:
                out = buffers.take(shape, values)
                np.copyto(out, every(values, done))
            else:
                combine(out, every(values, done), out=out)
            done += length
        if 2 * length > kernel:
            break
        step = length * window.dilation
        size = values.shape[axis] - step
        longer = list(values.shape)
        longer[axis] = size
        into = buffers.take(tuple(longer), values, *(() if out is None else (out,)))
        first, second = _part(values, axis, slice(0, size)), _part(values, axis, slice(step, step + size))
        values = combine(first, second, out=into)
        length *= 2
    if out is None:  # two overlapping windows make up the whole one
        out = combine(every(values, 0), every(values, kernel - length), out=buffers.take(shape, values))
    return out


def _part(values: NDArray[Any], axis: int, where: slice) -> NDArray[Any]:
    part: NDArray[Any] = values[(*(slice(None),) * axis, where)]
    return part
