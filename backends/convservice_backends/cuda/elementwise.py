"""Elementwise work on a device: copies of rows, roundings, activation layers.

Given two arrays of the same shape, `copy_launch` is the kernel that fills one from the other, rounding each
element once to the target's type. `DeviceArrays` is what stages and sessions ask for arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from convservice.dtypes import DTYPES, DType
from convservice.geometry import SampleShape
from convservice.layers import FUNCTIONS, Activation
from convservice_backends.cuda.algorithms.base import ceil_div, float_types
from convservice_backends.cuda.arguments import MapArguments
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import Launch, Memory, Stream
from convservice_backends.cuda.source import Kernel, type_constants, type_label
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Run
from convservice_backends.plan import BlockPlan

THREADS = 256
PER_THREAD = 4
"""Elements of one thread, a grid's width apart."""
MOST_BLOCKS = 65_535

COPIED_AS = {1: DTYPES[4], 2: DTYPES[6], 4: DTYPES[0], 8: DTYPES[1]}
"""Item size to the type whose kernel copies elements of that size, bit for bit."""

LINEAR = Activation()


def every_kernel() -> Iterator[Kernel]:
    """All forms: copies, activations, and the roundings that a session may ask for."""
    for dtype in COPIED_AS.values():
        yield _copy_kernel(dtype)
    pairs = dict.fromkeys(float_types())
    for given in DTYPES:
        if given.is_float:
            pairs |= {(given, out): None for out in DTYPES}
        else:
            pairs |= {(given, out): None for out in DTYPES[:2]}
    for given, out in pairs:
        yield _map_kernel(given, out)


def copy_launch(source: DeviceArray, target: DeviceArray, activation: Activation = LINEAR) -> Launch | None:
    """Fills `target` with the elements of `source`, each rounded once; None where there are none.

    Args:
        source: any dtype of the service, any sample and channel strides.
        target: of the same shape; in no element the same memory, unless it is `source` itself.
        activation: applied before the rounding.
    """
    samples, channels = target.shape[:2]
    elements = math.prod(target.shape[2:])
    if not samples * channels * elements:
        return None
    arguments = MapArguments(
        input=source.address,
        output=target.address,
        input_sample=source.strides[0],
        input_channel=source.strides[1],
        output_sample=target.strides[0],
        output_channel=target.strides[1],
        elements=elements,
        samples=samples,
        channels=channels,
        activation=FUNCTIONS.index(activation.function),
        slope=activation.negative_slope,
    )
    _merge(arguments)
    if source.dtype == target.dtype and activation.function == "linear":
        kernel = _copy_kernel(COPIED_AS[source.dtype.itemsize])
    else:
        kernel = _map_kernel(source.dtype, target.dtype)
    grid = (
        min(ceil_div(arguments.elements, THREADS * PER_THREAD), MOST_BLOCKS),
        min(arguments.channels, MOST_BLOCKS),
        min(arguments.samples, MOST_BLOCKS),
    )
    return Launch(kernel, grid, arguments, (source.memory, target.memory))


def _merge(a: MapArguments) -> None:
    """Takes axes that are contiguous on both sides as one."""
    if a.channels == 1 or a.input_channel == a.output_channel == a.elements:
        a.elements *= a.channels
        a.channels = 1
        if a.samples == 1 or a.input_sample == a.output_sample == a.elements:
            a.elements *= a.samples
            a.samples = 1


class DeviceArrays:
    """Arrays on one stream, as stages and sessions ask for them; see `arrays.Arrays`."""

    moved_bytes = 16 << 20

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """A packed array."""
        return DeviceArray.packed(self._stream.allocate(math.prod(shape) * dtype.itemsize), shape, dtype)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Fills `target` with `source`, each element rounded once."""
        launch = copy_launch(source, target)
        if launch is not None:
            self._stream.launch(launch)

    def convert(self, array: DeviceArray, dtype: DType) -> DeviceArray:
        """The array rounded to a dtype; the array itself where it has that dtype."""
        if array.dtype == dtype:
            return array
        out = self.empty(array.shape, dtype)
        self.copy(array, out)
        return out


class ActivationOperator:
    """An activation layer: rows in, the same rows out."""

    name = "elementwise"
    packing = ()

    def __init__(self, layer: Activation) -> None:
        self._layer = layer

    def weights(self) -> tuple[()]:
        """None."""
        return ()

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits."""
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
        """Applies the function to rows first <= i < last."""
        given = run.rows[:, :, run.first - run.first_row : run.last - run.first_row]
        launch = copy_launch(given, out, self._layer)
        if launch is not None:
            workspace.stream.launch(launch)
        workspace.check()


def _copy_kernel(dtype: DType) -> Kernel:
    constants = (*type_constants(dtype, dtype), ("COPY", 1))
    return Kernel("elementwise", f"copy_{dtype.itemsize}", THREADS, constants, "map")


def _map_kernel(given: DType, out: DType) -> Kernel:
    constants = (*type_constants(given, out), ("COPY", 0))
    return Kernel("elementwise", type_label(given, out), THREADS, constants, "map")
