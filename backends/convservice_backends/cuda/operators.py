"""Which operator computes a layer on a device.

`operator_for` is given a layer and what its rows will be, and hands on its operator. That is prepared for all
devices: one of them computes with the operator that `placed` makes of it and of its weights there.
`compute_whole` has one layer compute whole feature maps by itself, for measurements and tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convservice.dtypes import DType
from convservice.errors import BackendUnavailable, Reason
from convservice.geometry import SampleShape
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.wire.enums import Precision
from convservice_backends.cuda.addition import AddOperator
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.convolution import ConvOperator
from convservice_backends.cuda.device import DeviceInfo, Memory, Stream
from convservice_backends.cuda.elementwise import ActivationOperator
from convservice_backends.cuda.reducing import FlattenOperator, GlobalPoolOperator, LinearOperator
from convservice_backends.cuda.windowed import LocalOperator, PoolOperator, TransposedOperator
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import AnyOperator, Rows, Run
from convservice_backends.plan import BlockPlan

WindowedDeviceOperator = (
    ConvOperator | ActivationOperator | AddOperator | PoolOperator | TransposedOperator | LocalOperator
)
ReducingDeviceOperator = GlobalPoolOperator | LinearOperator | FlattenOperator
DeviceOperator = WindowedDeviceOperator | ReducingDeviceOperator

LAYERS = (
    Conv,
    Activation,
    Add,
    MaxPool,
    AvgPool,
    ConvTranspose,
    LocallyConnected,
    GlobalMaxPool,
    GlobalAvgPool,
    Linear,
    Flatten,
)
"""The layers that devices compute."""


def operator_for(
    layer: Layer,
    given: Sequence[DType],
    sample: SampleShape,
    *,
    precision: Precision,
    info: DeviceInfo,
    algorithm: str | None = None,
) -> DeviceOperator:
    """The operator of a layer.

    Args:
        layer: the layer.
        given: dtype of the rows of each of its inputs, float types.
        sample: shape of the samples on its first input; its rows are not looked at.
        precision: what the caller allows.
        info: the device.
        algorithm: a convolution algorithm to take wherever it fits.

    Raises:
        BackendUnavailable: there is none.
    """
    if isinstance(layer, Conv):
        return ConvOperator(layer, given[0], sample, precision=precision, info=info, algorithm=algorithm)
    found = _reducing(layer, given[0], sample) if layer.reducing else _windowed(layer, given, sample)
    if found is None:
        raise BackendUnavailable(
            f"a CUDA device has no {layer.type_name} layer", reason=Reason.BACKEND_UNAVAILABLE
        )
    return found


def _windowed(layer: Layer, given: Sequence[DType], sample: SampleShape) -> WindowedDeviceOperator | None:
    match layer:
        case Activation():
            return ActivationOperator(layer)
        case Add():
            return AddOperator(layer, given)
        case MaxPool() | AvgPool():
            return PoolOperator(layer, given[0], sample)
        case ConvTranspose():
            return TransposedOperator(layer, given[0])
        case LocallyConnected():
            return LocalOperator(layer, given[0])
        case _:
            return None


def _reducing(layer: Layer, given: DType, sample: SampleShape) -> ReducingDeviceOperator | None:
    match layer:
        case GlobalMaxPool() | GlobalAvgPool():
            return GlobalPoolOperator(layer, given, sample)
        case Linear():
            return LinearOperator(layer, given, sample)
        case Flatten():
            return FlattenOperator()
        case _:
            return None


@dataclass(frozen=True)
class PlacedWindowed:
    """A windowed operator with its weights on one device."""

    operator: WindowedDeviceOperator
    weights: tuple[Memory, ...]

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """See `operators.Operator`."""
        return self.operator.block_plan(given, out)

    def compute(self, run: Run, out: DeviceArray, workspace: DeviceWorkspace) -> None:
        """See `operators.Operator`."""
        self.operator.compute(run, out, workspace, self.weights)


@dataclass(frozen=True)
class PlacedReducing:
    """A reducing operator with its weights on one device."""

    operator: ReducingDeviceOperator
    weights: tuple[Memory, ...]

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """See `operators.ReducingOperator`."""
        return self.operator.block_plan(given, out)

    def sums(self, given: SampleShape, out: SampleShape) -> tuple[tuple[int, ...], DType] | None:
        """See `operators.ReducingOperator`."""
        return self.operator.sums(given, out)

    def accumulate(
        self, run: Run, sums: DeviceArray | None, out: DeviceArray, workspace: DeviceWorkspace
    ) -> None:
        """See `operators.ReducingOperator`."""
        self.operator.accumulate(run, sums, out, workspace, self.weights)

    def finish(
        self,
        height: int,
        given: SampleShape,
        sums: DeviceArray | None,
        out: DeviceArray,
        workspace: DeviceWorkspace,
    ) -> None:
        """See `operators.ReducingOperator`."""
        self.operator.finish(height, sums, out, workspace, self.weights)


def placed(operator: DeviceOperator, weights: tuple[Memory, ...]) -> AnyOperator:
    """An operator with its weights on one device."""
    if isinstance(operator, ReducingDeviceOperator):
        return PlacedReducing(operator, weights)
    return PlacedWindowed(operator, weights)


def compute_whole(
    operator: DeviceOperator,
    inputs: Sequence[DeviceArray],
    out: DeviceArray,
    stream: Stream,
    *,
    info: DeviceInfo,
    weights: tuple[Memory, ...],
) -> None:
    """Computes whole samples' feature maps.

    Args:
        operator: of the layer.
        inputs: (samples, channels, rows, *rest), one for each of its inputs.
        out: (samples, channels, rows, *rest).
        stream: on which it launches, and takes its working memory.
        info: the device.
        weights: the operator's, on the device.
    """
    given, whole = _sample_of(inputs[0]), _sample_of(out)
    ports = tuple(Rows(rows, 0) for rows in inputs)
    blocks = operator.block_plan(given, whole)
    rows = given.height if isinstance(operator, ReducingDeviceOperator) else whole.height
    wanted = operator.scratch_bytes(whole, rows, out.shape[0])
    workspace = DeviceWorkspace(stream, stream.allocate(wanted) if wanted else None, info, lambda: None)
    run = Run(ports, given.rows, 0, rows, blocks)
    if not isinstance(operator, ReducingDeviceOperator):
        operator.compute(run, out, workspace, weights)
        return
    kept = operator.sums(given, whole)
    sums = None
    if kept is not None:
        shape, dtype = (out.shape[0], *kept[0]), kept[1]
        sums = DeviceArray.packed(stream.allocate(math.prod(shape) * dtype.itemsize), shape, dtype)
    operator.accumulate(run, sums, out, workspace, weights)
    operator.finish(given.height, sums, out, workspace, weights)


def _sample_of(array: DeviceArray) -> SampleShape:
    return SampleShape(array.shape[1], array.shape[2], array.shape[3:])
