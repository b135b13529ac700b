"""Layers on a device that need all rows of a sample: global pooling, fully connected layers, flattening.

The first two say how a part of their sums is computed (see `summing`); a flattened map is but put in place.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.geometry import SampleShape
from convservice.layers import Activation, GlobalAvgPool, GlobalMaxPool, Linear
from convservice_backends.cuda import pieces
from convservice_backends.cuda.algorithms.base import ceil_div, float_types
from convservice_backends.cuda.arguments import PartsArguments
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import Memory
from convservice_backends.cuda.elementwise import copy_launch
from convservice_backends.cuda.source import Kernel, type_constants
from convservice_backends.cuda.summing import TERMS, THREADS, SummingOperator
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Run
from convservice_backends.plan import BlockPlan

WARPS = THREADS // 32

FOLLOWING = 64
"""Elements of one channel that a block of rows of a fully connected layer has at least, if the sample has
them: their weights lie beside each other in memory."""

OUTPUTS = 4
"""Outputs that a warp of linear.cu computes at once."""

SEVERAL = 8
"""Samples for which it reads a weight once, where there are more than one."""


class GlobalPoolOperator(SummingOperator):
    """The largest value of each channel, or the average."""

    name = "global_pool"

    def __init__(self, layer: GlobalMaxPool | GlobalAvgPool, given: DType, sample: SampleShape) -> None:
        row = math.prod(sample.rest)
        rows = max(1, TERMS // row)
        super().__init__(given, sample, sample.channels, block_rows=rows, block_terms=rows * row)
        self._maximum = isinstance(layer, GlobalMaxPool)

    @property
    def maximum(self) -> bool:
        """Whether it is the largest value."""
        return self._maximum

    def divisor(self, elements: int) -> float:
        """The elements, for an average."""
        return 1.0 if self.maximum else float(elements)

    def _part_launch(
        self, arguments: PartsArguments, first: int, weights: tuple[Memory, ...]
    ) -> tuple[Kernel, tuple[int, int, int]]:
        """A warp for each part of each channel."""
        warps = arguments.samples * arguments.channels * arguments.parts_at_all
        return _global_pool_kernel(self._given, maximum=self.maximum), (ceil_div(warps, WARPS), 1, 1)


class LinearOperator(SummingOperator):
    """A fully connected layer, given the feature map that its vector is made of."""

    name = "linear"

    def __init__(self, layer: Linear, given: DType, sample: SampleShape) -> None:
        row = math.prod(sample.rest)
        self._height = layer.in_features // (sample.channels * row)
        rows = max(1, min(self._height, ceil_div(FOLLOWING, row)))
        terms = sample.channels * rows * row
        super().__init__(given, sample, layer.out_features, block_rows=rows, block_terms=terms)
        self._layer = layer

    def weights(self) -> tuple[NDArray[Any], ...]:
        """As the layer has them, in the type of the rows; thresholds in the type of the sums."""
        weight = np.ascontiguousarray(self._layer.weight).astype(self._given.numpy, copy=False)
        bias = self._layer.bias
        return (weight,) if bias is None else (weight, bias.astype(self._sums.numpy))

    @property
    def thresholds(self) -> int | None:
        """The second of its weights."""
        return None if self._layer.bias is None else 1

    @property
    def activation(self) -> Activation:
        """The layer's."""
        return self._layer.activation

    def _part_launch(
        self, arguments: PartsArguments, first: int, weights: tuple[Memory, ...]
    ) -> tuple[Kernel, tuple[int, int, int]]:
        """A warp for each part of some outputs."""
        arguments.weights = weights[0].address + first * self._row * self._given.itemsize
        arguments.features = self._layer.in_features
        arguments.weight_channel = self._height * self._row
        samples = SEVERAL if arguments.samples > 1 else 1
        warps = ceil_div(self._outputs, OUTPUTS) * arguments.parts_at_all
        along_y = min(ceil_div(arguments.samples, samples), pieces.MOST_ALONG_Y)
        return _linear_kernel(self._given, samples), (ceil_div(warps, WARPS), along_y, 1)


class FlattenOperator:
    """A feature map laid out as a vector: rows are put in their places as they come."""

    name = "copy"
    packing: tuple[Hashable, ...] = ()

    def weights(self) -> tuple[()]:
        """None."""
        return ()

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows."""
        return BlockPlan(self.name, 1, out.rest, 0)

    def sums(self, given: SampleShape, out: SampleShape) -> None:
        """None."""

    def scratch_bytes(self, out: SampleShape, rows: int, samples: int) -> int:
        """None."""
        return 0

    def library_bytes(self, out: SampleShape) -> int:
        """None."""
        return 0

    def accumulate(
        self,
        run: Run,
        sums: DeviceArray | None,
        out: DeviceArray,
        workspace: DeviceWorkspace,
        weights: tuple[Memory, ...],
    ) -> None:
        """Copies input rows first <= i < last."""
        rows = run.rows[:, :, run.first - run.first_row : run.last - run.first_row]
        row = math.prod(rows.shape[3:])
        height = out.shape[1] // (rows.shape[1] * row)
        places = replace(
            out,
            shape=rows.shape,
            strides=(out.strides[0], height * row * out.strides[1], row),
            offset=out.offset + run.first * row,
        )
        launch = copy_launch(rows, places)
        if launch is not None:
            workspace.stream.launch(launch)
        workspace.check()

    def finish(
        self,
        height: int,
        sums: DeviceArray | None,
        out: DeviceArray,
        workspace: DeviceWorkspace,
        weights: tuple[Memory, ...],
    ) -> None:
        """Nothing is left to do."""


def every_kernel() -> Iterator[Kernel]:
    """All forms."""
    for given in dict.fromkeys(given for given, _ in float_types()):
        for maximum in (True, False):
            yield _global_pool_kernel(given, maximum=maximum)
        for samples in (1, SEVERAL):
            yield _linear_kernel(given, samples)


def _global_pool_kernel(given: DType, *, maximum: bool) -> Kernel:
    constants = (*type_constants(given, given.accumulator), ("MAXIMUM", int(maximum)), ("TERMS", TERMS))
    return Kernel(
        "global_pool", f"{'max' if maximum else 'average'}_{given.name}", THREADS, constants, "parts"
    )


def _linear_kernel(given: DType, samples: int) -> Kernel:
    constants = (
        *type_constants(given, given.accumulator),
        ("SAMPLES", samples),
        ("OUTPUTS", OUTPUTS),
        ("TERMS", TERMS),
    )
    return Kernel("linear", f"{given.name}_samples{samples}", THREADS, constants, "parts")
