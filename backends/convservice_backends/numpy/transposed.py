"""Transposed convolution on the processor: gathered, not scattered.

Neurons whose places leave the same rest when divided by the stride (a *phase*) look at the input through the
same few weights; so each phase is a plain convolution of the input, with the part of the filters that it
meets, and goes by im2col and one product as any other. A neuron's sum is of its own products alone, in an
order that the layer fixes, and a block's neighbours add nothing to it. Blocks lie at absolute multiples;
every product of a phase has the shape that a full block gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import ConvTranspose, TransposedWindow
from convservice_backends.numpy.blocks import Block, Reach, aligned, blocks_of, carve, cut, read
from convservice_backends.numpy.elementwise import activation_function, store, temporary_bytes
from convservice_backends.numpy.im2col import COLUMNS_BYTES, FEWEST_COLUMNS, MOST_COLUMNS_BYTES, MOST_WORK
from convservice_backends.operators import Run, Task, Workspace
from convservice_backends.plan import BlockPlan

MOST_BLOCK_BYTES = 8 << 20
"""What a block's result, or the input under it, may take where it has more than one row: a large stride makes
much of little."""


class AxisPhase(NamedTuple):
    """The neurons of one phase along an axis.

    Attributes:
        rest: what their places leave, divided by the stride.
        taps: the weights they meet, in the order of the input positions that they stand on.
        step: input positions from one of them to the next.
    """

    rest: int
    taps: tuple[int, ...]
    step: int


class _Line(NamedTuple):
    """A phase's part of a block along one axis.

    Attributes:
        first: its first neuron, counted from the block's first.
        neurons: how many there are within the feature map.
        start: virtual input position under the first one's first tap.
        taps, step: as in `AxisPhase`.
    """

    first: int
    neurons: int
    start: int
    taps: int
    step: int


class TransposedOperator:
    """A transposed convolution by phases, im2col and GEMM.

    Args:
        layer: the layer; its filters are copied, phase by phase.
        accumulator: the type of its sums.
    """

    def __init__(self, layer: ConvTranspose, accumulator: DType) -> None:
        self._layer = layer
        self._dtype = accumulator.numpy
        self._windows = layer.windows(SampleShape(layer.in_channels, None, (1,) * (layer.rank - 1)))
        self._phases = tuple(_axis_phases(window) for window in self._windows)
        self._group_in = layer.in_channels // layer.groups
        self._group_out = layer.out_channels // layer.groups
        self._filters = {
            tuple(phase.rest for phase in phases): self._filters_of(phases)
            for phases in product(*self._phases)
        }
        bias = np.zeros(layer.out_channels) if layer.bias is None else layer.bias
        self._bias = bias.astype(self._dtype).reshape(-1, *(1 for _ in layer.kernel))
        self._activate = activation_function(layer.activation)
        self.nbytes = sum(filters.nbytes for filters in self._filters.values())

    def _filters_of(self, phases: Sequence[AxisPhase]) -> NDArray[Any]:
        """The weights that a phase meets, (groups, out_channels / groups, in_channels / groups * taps)."""
        layer = self._layer
        taken = layer.weight[np.ix_(*map(range, layer.weight.shape[:2]), *(phase.taps for phase in phases))]
        grouped = taken.reshape(layer.groups, self._group_in, *taken.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(grouped.reshape(layer.groups, self._group_out, -1), dtype=self._dtype)

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """As many whole rows as the columns' size allows, else a part of a row; in whole strides where their
        results are not too large."""
        item, strides = self._dtype.itemsize, self._layer.stride
        taps = math.prod(max((len(phase.taps) for phase in phases), default=1) for phases in self._phases)
        column_bytes = self._layer.in_channels * taps * item
        columns = max(FEWEST_COLUMNS, COLUMNS_BYTES // column_bytes)
        work = self._layer.out_channels * self._group_in * math.prod(self._layer.kernel)
        columns = max(1, min(columns, MOST_COLUMNS_BYTES // column_bytes, MOST_WORK // work))
        rest = tuple(-(-size // stride) for size, stride in zip(out.rest, strides[1:], strict=True))
        rows, inner = cut(columns, rest)
        sizes = [rows * strides[0]]
        sizes += [min(n * s, size) for n, s, size in zip(inner, strides[1:], out.rest, strict=True)]
        for axis in range(len(sizes)):  # rows first
            too_large = -(-self._largest_bytes(sizes) // MOST_BLOCK_BYTES)
            if too_large > 1:
                sizes[axis] = max(1, sizes[axis] // too_large)
        scratch = sum(self._sizes(sizes))
        elements = self._layer.out_channels * math.prod(sizes)
        return BlockPlan(
            "phases", sizes[0], tuple(sizes[1:]), scratch, temporary_bytes(elements, dtype_of(self._dtype))
        )

    def _largest_bytes(self, sizes: Sequence[int]) -> int:
        """Bytes of a block's result or of the input under it, whichever is more."""
        window, _, _, result = self._sizes(sizes)
        return max(window, result)

    def _spans(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Most input positions along each axis that a block looks at."""
        return tuple(window.reach(size) + 1 for window, size in zip(self._windows, sizes, strict=True))

    def _counts(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Neurons of a phase along each axis of a full block."""
        return tuple(-(-size // stride) for size, stride in zip(sizes, self._layer.stride, strict=True))

    def _sizes(self, sizes: Sequence[int]) -> tuple[int, int, int, int]:
        """Bytes of a block's window, of a phase's columns and products, and of the result, for one sample."""
        columns = math.prod(self._counts(sizes))
        deepest = max((filters.shape[2] for filters in self._filters.values()), default=0)
        return (
            aligned(self._layer.in_channels * math.prod(self._spans(sizes)), self._dtype),
            aligned(self._layer.groups * deepest * columns, self._dtype),
            aligned(self._layer.out_channels * columns, self._dtype),
            aligned(self._layer.out_channels * math.prod(sizes), self._dtype),
        )

    def compute(self, run: Run, out: NDArray[Any], workspace: Workspace) -> None:
        """Computes output rows first <= i < last, a block a task; small samples several to a block."""
        sizes = (run.blocks.rows, *run.blocks.inner)
        stack = max(1, run.blocks.scratch_bytes // sum(self._sizes(sizes)))
        tasks = [self._task(block, run, out, workspace) for block in blocks_of(run, out.shape, stack)]
        per_output = self._group_in * math.prod(self._layer.kernel) / math.prod(self._layer.stride)
        workspace.run(tasks, float(out.size) * per_output)

    def _task(self, block: Block, run: Run, out: NDArray[Any], workspace: Workspace) -> Task:
        def task(worker: int) -> None:
            with np.errstate(all="ignore"):
                store(self._block(block, run, workspace.scratch(worker)), block.target(run, out))

        return task

    def _block(self, block: Block, run: Run, scratch: NDArray[np.uint8]) -> NDArray[Any]:
        """The block's feature maps (samples, out_channels, *inside), in the accumulator's type."""
        sizes = (run.blocks.rows, *run.blocks.inner)
        samples = block.samples.stop - block.samples.start
        window_bytes, columns_bytes, products_bytes, _ = (samples * size for size in self._sizes(sizes))
        window, starts = self._window(block, sizes, run, scratch)
        columns = scratch[window_bytes:]
        products = columns[columns_bytes:]
        shape = (samples, self._layer.out_channels, *block.inside)
        result = carve(products[products_bytes:], shape, self._dtype)
        result[...] = self._bias  # all that a neuron has whose phase meets no weight
        for key, lines in self._lines(block):
            fields = _fields(window, starts, lines, self._counts(sizes))
            sums = self._product(self._filters[key], fields, columns, products)
            inside = tuple(slice(0, line.neurons) for line in lines)
            stride = self._layer.stride
            places = tuple(slice(line.first, None, step) for line, step in zip(lines, stride, strict=True))
            every = (slice(None), slice(None))
            np.add(sums[(*every, *inside)], self._bias, out=result[(*every, *places)])
        if self._activate is not None:
            self._activate(result)
        return result

    def _lines(self, block: Block) -> Iterator[tuple[tuple[int, ...], tuple[_Line, ...]]]:
        """The phases that have neurons in a block, by their rests, with their part along each axis."""
        axes = [
            list(_lines(phases, window, first, inside))
            for phases, window, first, inside in zip(
                self._phases, self._windows, block.first, block.inside, strict=True
            )
        ]
        for parts in product(*axes):
            yield tuple(rest for rest, _ in parts), tuple(line for _, line in parts)

    def _window(
        self, block: Block, sizes: tuple[int, ...], run: Run, scratch: NDArray[np.uint8]
    ) -> tuple[NDArray[Any], tuple[int, ...]]:
        """The input under a block, zero beyond what its neurons look at, and where it begins."""
        source = run.rows[block.samples]
        axes: list[Reach] = []
        for window, first, inside, whole in zip(
            self._windows, block.first, block.inside, self._spans(sizes), strict=True
        ):
            start, stop = window.span(first, first + inside)
            axes.append(Reach(start, max(0, stop - start), whole))
        shape = (*source.shape[:2], *(axis.whole for axis in axes))
        into = carve(scratch, shape, self._dtype)
        read(source, run.first_row, (run.height, *run.rows.shape[3:]), axes, into)
        return into, tuple(axis.start for axis in axes)

    def _product(
        self,
        filters: NDArray[Any],
        fields: NDArray[Any],
        columns_memory: NDArray[np.uint8],
        products_memory: NDArray[np.uint8],
    ) -> NDArray[Any]:
        """A phase's sums without thresholds, (samples, out_channels, *counts of a full block)."""
        rank, groups = self._layer.rank, self._layer.groups
        samples, counts = fields.shape[0], fields.shape[-rank:]
        count = math.prod(counts)
        columns = carve(columns_memory, (samples, groups, filters.shape[2], count), self._dtype)
        np.copyto(columns.reshape(fields.shape), fields)
        sums = carve(products_memory, (samples, groups, self._group_out, count), self._dtype)
        np.matmul(filters, columns, out=sums)
        return sums.reshape(samples, groups * self._group_out, *counts)


def _fields(
    window: NDArray[Any], starts: Sequence[int], lines: Sequence[_Line], counts: Sequence[int]
) -> NDArray[Any]:
    """What the neurons of a phase look at, a view (samples, in_channels, *taps, *counts)."""
    begin = (slice(line.start - start, None) for line, start in zip(lines, starts, strict=True))
    at = window[(slice(None), slice(None), *begin)]
    steps = at.strides[2:]
    return as_strided(
        at,
        (*at.shape[:2], *(line.taps for line in lines), *counts),
        (*at.strides[:2], *(step * line.step for step, line in zip(steps, lines, strict=True)), *steps),
    )


def _axis_phases(window: TransposedWindow) -> tuple[AxisPhase, ...]:
    """The phases along an axis that meet any weight."""
    taps: dict[int, list[int]] = {}
    for tap in reversed(range(window.kernel)):
        taps.setdefault((tap * window.dilation - window.before) % window.stride, []).append(tap)
    step = window.dilation // math.gcd(window.dilation, window.stride)
    return tuple(AxisPhase(rest, tuple(found), step) for rest, found in sorted(taps.items()))


def _lines(
    phases: Sequence[AxisPhase], window: TransposedWindow, first: int, inside: int
) -> Iterator[tuple[int, _Line]]:
    """The part of each phase that has neurons in first <= i < first + inside."""
    for phase in phases:
        offset = (phase.rest - first) % window.stride
        if offset < inside:
            count = (inside - offset - 1) // window.stride + 1
            # The first tap is the last weight, which stands on the lowest input position.
            start = (first + offset + window.before - phase.taps[0] * window.dilation) // window.stride
            yield phase.rest, _Line(offset, count, start, len(phase.taps), phase.step)
