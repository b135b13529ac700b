"""Windowed layers beside the convolution on a device: rows in, rows out, one kernel each.

`WindowedOperator` is what they share: any rows give the same bits, a run is launched in pieces of bounded
work, and threads are dealt out to planes (kernels/planes.cuh). Pooling, the transposed convolution and the
locally connected layer each say what a launch is given.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.geometry import MAX_SIZE, SampleShape
from convservice.layers import FUNCTIONS, AvgPool, ConvTranspose, LocallyConnected, MaxPool
from convservice_backends.cuda import pieces
from convservice_backends.cuda.algorithms.base import ceil_div, float_types
from convservice_backends.cuda.arguments import AxisArguments, ConvArguments, PoolArguments
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.axes import Axes, sliding_axes, transposed_axes
from convservice_backends.cuda.device import Launch, Memory
from convservice_backends.cuda.source import Kernel, type_constants, type_label
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Run
from convservice_backends.plan import BlockPlan

THREADS = 128

FILTERS = 8
"""Filters that a thread of transposed.cu computes, unless a group has one."""

LOCAL_SAMPLES = 4
"""Samples for which a thread of local.cu reads a weight once."""

WEIGHTS_AHEAD = 8
"""Weights that a thread of local.cu asks for at once."""


class WindowedOperator(ABC):
    """One layer for rows of one type.

    Args:
        given: dtype of the rows it reads, a float type.
    """

    name: ClassVar[str]
    most_positions: ClassVar[int] = MAX_SIZE
    """Outputs of one channel that a launch may have."""

    def __init__(self, given: DType) -> None:
        self._given = given

    @property
    def packing(self) -> tuple[Hashable, ...]:
        """What its weights on the device depend on beside the layer."""
        return (self._given, self.name)

    def weights(self) -> tuple[NDArray[Any], ...]:
        """What has to be on the device."""
        return ()

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits."""
        pieces.check_positions(math.prod(out.rest), self.most_positions)
        return BlockPlan(self.name, 1, out.rest, 0, any_rows=True)

    def scratch_bytes(self, out: SampleShape, rows: int, samples: int) -> int:
        """None."""
        return 0

    def library_bytes(self, out: SampleShape) -> int:
        """None."""
        return 0

    def compute(
        self, run: Run, out: DeviceArray, workspace: DeviceWorkspace, weights: tuple[Memory, ...]
    ) -> None:
        """Writes output rows first <= i < last to `out`."""
        samples, channels, _, *rest = out.shape
        positions = math.prod(rest)
        work = samples * channels * positions * self.products
        step = pieces.rows_at_once(work, positions, run.last - run.first, most_positions=self.most_positions)
        for first in range(run.first, run.last, step):
            part = out[:, :, first - run.first : min(first + step, run.last) - run.first]
            workspace.stream.launch(self.launch(run, first, part, weights))
            workspace.check()

    @property
    @abstractmethod
    def products(self) -> int:
        """Elements that an output looks at, at most."""

    @abstractmethod
    def launch(self, run: Run, first: int, out: DeviceArray, weights: tuple[Memory, ...]) -> Launch:
        """What computes the output rows from `first` on, as many as `out` has."""


class PoolOperator(WindowedOperator):
    """A pooling layer."""

    name = "pool"

    def __init__(self, layer: MaxPool | AvgPool, given: DType, sample: SampleShape) -> None:
        super().__init__(given)
        self._layer = layer
        self._products = math.prod(window.kernel for window in layer.windows(sample))

    @property
    def products(self) -> int:
        """Elements of a window."""
        return self._products

    def launch(self, run: Run, first: int, out: DeviceArray, weights: tuple[Memory, ...]) -> Launch:
        """See `WindowedOperator`."""
        layer, rows = self._layer, run.rows
        sample = SampleShape(rows.shape[1], run.height, rows.shape[3:])
        windows = layer.windows(sample)
        axes = sliding_axes(windows, run, first, out)
        arguments = PoolArguments(
            window=_arguments(rows, out, axes, groups=rows.shape[1]),
            ends=(1, 1, 1),
            counts_padding=isinstance(layer, AvgPool) and layer.count_include_pad,
        )
        behind = zip(range(3 - len(windows), 3), windows, axes[3 - len(windows) :], strict=True)
        for axis, window, held in behind:
            arguments.ends[axis] = min(held.high + window.after, MAX_SIZE)
        maximum = isinstance(layer, MaxPool)
        planes = out.shape[0] * out.shape[1]
        grid = pieces.plane_grid(arguments.window.positions, planes, THREADS)
        kernel = _pool_kernel(self._given, out.dtype, maximum=maximum)
        return Launch(kernel, grid, arguments, (rows.memory, out.memory))


class TransposedOperator(WindowedOperator):
    """A transposed convolution."""

    name = "transposed"
    most_positions = 1 << 28  # three axes of threads may be twice as long each as the axes of outputs

    def __init__(self, layer: ConvTranspose, given: DType) -> None:
        super().__init__(given)
        self._layer = layer
        self._filters = 1 if layer.out_channels == layer.groups else FILTERS

    @property
    def products(self) -> int:
        """Those of one output, on average over the phases; at least one weight a channel."""
        layer = self._layer
        taps = math.prod(
            -(-kernel // stride) for kernel, stride in zip(layer.kernel, layer.stride, strict=True)
        )
        return layer.in_channels // layer.groups * taps

    def weights(self) -> tuple[NDArray[Any], ...]:
        """(groups, banks, channels of a group, taps, filters of a bank), and the thresholds."""
        layer, sums = self._layer, self._given.accumulator.numpy
        given, of_group = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        filters = layer.weight.astype(sums).reshape(layer.groups, given, of_group, -1)
        missing = -of_group % self._filters
        filters = np.pad(filters, ((0, 0), (0, 0), (0, missing), (0, 0)))
        banks = filters.reshape(layer.groups, given, -1, self._filters, filters.shape[-1])
        packed = np.ascontiguousarray(banks.transpose(0, 2, 1, 4, 3))
        return (packed,) if layer.bias is None else (packed, layer.bias.astype(sums))

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits; coordinates have 32 bits."""
        for axis, window in enumerate(self._layer.windows(given)):
            size = out.spatial[axis] if axis else self.most_positions
            reach = window.before + window.extent + window.stride + (size or 0)
            pieces.check_positions(reach, MAX_SIZE, f"what is computed of spatial axis {axis}")
        return super().block_plan(given, out)

    def launch(self, run: Run, first: int, out: DeviceArray, weights: tuple[Memory, ...]) -> Launch:
        """See `WindowedOperator`."""
        layer, rows = self._layer, run.rows
        sample = SampleShape(rows.shape[1], run.height, rows.shape[3:])
        axes, skipped = transposed_axes(layer.windows(sample), run, first, out)
        arguments = _arguments(
            rows[:, :, skipped:],
            out,
            axes,
            filters=weights[0].address,
            thresholds=weights[1].address if len(weights) > 1 else 0,
            groups=layer.groups,
            group_in=layer.in_channels // layer.groups,
            group_out=layer.out_channels // layer.groups,
            taps=math.prod(layer.kernel),
            activation=FUNCTIONS.index(layer.activation.function),
            slope=layer.activation.negative_slope,
        )
        banks = layer.groups * ceil_div(arguments.group_out, self._filters)
        grid = pieces.plane_grid(math.prod(map(_threads_along, axes)), out.shape[0] * banks, THREADS)
        kernel = _transposed_kernel(self._given, out.dtype, self._filters)
        return Launch(kernel, grid, arguments, (rows.memory, out.memory, *weights))


class LocalOperator(WindowedOperator):
    """A locally connected layer."""

    name = "local"

    def __init__(self, layer: LocallyConnected, given: DType) -> None:
        super().__init__(given)
        self._layer = layer

    @property
    def products(self) -> int:
        """Those of one output."""
        return self._layer.filters.shape[1] * math.prod(self._layer.kernel)

    def weights(self) -> tuple[NDArray[Any], ...]:
        """(out_channels, channels of a group, taps, positions) in the type of the rows; thresholds, where
        there are any, (out_channels, positions) in the type of the sums."""
        layer, positions = self._layer, math.prod(self._layer.output_spatial)
        filters = layer.weight.reshape(layer.out_channels, layer.filters.shape[1], positions, -1)
        packed = np.ascontiguousarray(filters.transpose(0, 1, 3, 2)).astype(self._given.numpy, copy=False)
        if layer.bias is None:
            return (packed,)
        bias = layer.bias.astype(self._given.accumulator.numpy).reshape(layer.out_channels, -1)
        return packed, np.ascontiguousarray(np.broadcast_to(bias, (layer.out_channels, positions)))

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits."""
        pieces.check_positions(math.prod(self._layer.output_spatial), what="a locally connected feature map")
        return super().block_plan(given, out)

    def launch(self, run: Run, first: int, out: DeviceArray, weights: tuple[Memory, ...]) -> Launch:
        """See `WindowedOperator`."""
        layer, rows = self._layer, run.rows
        sample = SampleShape(rows.shape[1], run.height, rows.shape[3:])
        before = first * math.prod(out.shape[3:])
        sums = self._given.accumulator
        arguments = _arguments(
            rows,
            out,
            sliding_axes(layer.windows(sample), run, first, out),
            filters=weights[0].address + before * self._given.itemsize,
            thresholds=weights[1].address + before * sums.itemsize if len(weights) > 1 else 0,
            groups=layer.groups,
            group_in=layer.in_channels // layer.groups,
            group_out=layer.out_channels // layer.groups,
            taps=math.prod(layer.kernel),
            activation=FUNCTIONS.index(layer.activation.function),
            filter_stride=math.prod(layer.output_spatial),
            slope=layer.activation.negative_slope,
        )
        planes = layer.out_channels * ceil_div(out.shape[0], LOCAL_SAMPLES)
        grid = pieces.plane_grid(arguments.positions, planes, THREADS)
        kernel = _local_kernel(self._given, out.dtype)
        return Launch(kernel, grid, arguments, (rows.memory, out.memory, *weights))


def every_kernel() -> Iterator[Kernel]:
    """All forms."""
    for given, out in float_types():
        for maximum in (True, False):
            yield _pool_kernel(given, out, maximum=maximum)
        for filters in (1, FILTERS):
            yield _transposed_kernel(given, out, filters)
        yield _local_kernel(given, out)


def _arguments(rows: DeviceArray, out: DeviceArray, axes: Axes, **more: Any) -> ConvArguments:
    """What every launch is given; channels are groups of one where nothing else is said."""
    return ConvArguments(
        input=rows.address,
        output=out.address,
        input_sample=rows.strides[0],
        input_channel=rows.strides[1],
        output_sample=out.strides[0],
        output_channel=out.strides[1],
        axes=axes,
        samples=out.shape[0],
        positions=math.prod(out.shape[2:]),
        **{"group_in": 1, "group_out": 1, "taps": math.prod(axis.kernel for axis in axes), **more},
    )


def _threads_along(axis: AxisArguments) -> int:
    """Threads along an axis of a transposed convolution: as many for each phase."""
    phases: int = min(axis.stride, axis.count)
    return phases * ceil_div(axis.count, phases)


def _pool_kernel(given: DType, out: DType, *, maximum: bool) -> Kernel:
    label = f"{'max' if maximum else 'average'}_{type_label(given, out)}"
    constants = (*type_constants(given, out), ("MAXIMUM", int(maximum)))
    return Kernel("pool", label, THREADS, constants, "pool")


def _transposed_kernel(given: DType, out: DType, filters: int) -> Kernel:
    label = f"{type_label(given, out)}_filters{filters}"
    return Kernel("transposed", label, THREADS, (*type_constants(given, out), ("FILTERS", filters)))


def _local_kernel(given: DType, out: DType) -> Kernel:
    constants = (*type_constants(given, out), ("SAMPLES", LOCAL_SAMPLES), ("AHEAD", WEIGHTS_AHEAD))
    return Kernel("local", type_label(given, out), THREADS, constants)
