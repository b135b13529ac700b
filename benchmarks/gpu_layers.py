"""One convolution on a device, ready to be asked for again and again.

`LayerOnDevice` is given a case with its tensors, prepares the operator that the backend would use (or a
forced algorithm) and asks for it on device arrays, the operator alone: no session, no copies, no transfers.
`measure` validates it, and only then times it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from benchmarks.gpu_arrays import Arrays, Held
from benchmarks.gpu_cases import ConvCase
from benchmarks.gpu_check import BASE_SAMPLES, Computed, demand_bounded, demand_exact
from benchmarks.gpu_clocks import REPEATS, Clock, Times, copies_for
from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms import NAMES
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.convolution import ConvOperator
from convservice_backends.cuda.device import Device, DeviceInfo, Launch, Stream, Transform
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Rows, Run

PRECISIONS = {
    "float32": ("float32", Precision.HIGH),
    "tf32": ("float32", Precision.FAST),
    "float16": ("float16", Precision.HIGH),
    "bfloat16": ("bfloat16", Precision.HIGH),
}
"""As the table has it: dtype of all tensors, and what the caller allows."""


@dataclass(frozen=True)
class Rig:
    """What is measured on.

    Attributes:
        device: the project's device.
        stream: its stream.
        arrays: where tensors are.
        clock: of work on `stream`.
        peer_clock: of PyTorch's work; None where there is no peer.
    """

    device: Device
    stream: Stream
    arrays: Arrays
    clock: Clock
    peer_clock: Clock | None = None


@dataclass(frozen=True)
class Tensors:
    """A case's tensors.

    Attributes:
        base: the distinct samples.
        x: all samples.
        weight: the filter bank, in the library of the arrays.
        layer: the layer with the same filters.
        dtype: of all.
    """

    base: Any
    x: Held
    weight: Any
    layer: Conv
    dtype: DType

    @classmethod
    def of(cls, case: ConvCase, dtype: DType, arrays: Arrays, *, integers: bool) -> Tensors:
        """Made at random, the same every time."""
        shape = (min(case.batch, BASE_SAMPLES), *case.x[1:])
        base = arrays.random(shape, dtype, integers=integers, seed=1)
        weight = arrays.random(case.weight, dtype, integers=integers, seed=2)
        x = arrays.held(arrays.repeated(base, case.batch))
        return cls(base, x, weight, Conv(arrays.host(weight), **cast("Any", case.geometry)), dtype)


class CountedStream:
    """A stream that counts what it is asked to launch."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.launches = 0

    def launch(self, launch: Launch) -> None:
        """See `device.Stream`."""
        self.launches += 1
        self._stream.launch(launch)

    def transform(self, transform: Transform) -> None:
        """See `device.Stream`; a transform counts as one launch, whatever its library makes of it."""
        self.launches += 1
        self._stream.transform(transform)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class CountedDevice:
    """A device whose streams count what they are asked to launch."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._streams: list[CountedStream] = []

    @property
    def launches(self) -> int:
        """Of all its streams until now."""
        return sum(stream.launches for stream in self._streams)

    def stream(self) -> CountedStream:
        """See `device.Device`."""
        stream = CountedStream(self._device.stream())
        self._streams.append(stream)
        return stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class LayerOnDevice:
    """A convolution with its weights, on as many copies of its tensors as a cache does not hold.

    Args:
        rig: what it is measured on.
        case: the case.
        tensors: its tensors.
        precision: what the caller allows.
        algorithm: one to force; the chosen one where not given.
        cache_bytes: size of the cache; one copy where it is 0.

    Attributes:
        copies: of input, packed filters and feature map.
        y: the feature maps.
    """

    def __init__(
        self,
        rig: Rig,
        case: ConvCase,
        tensors: Tensors,
        *,
        precision: Precision,
        algorithm: str | None = None,
        cache_bytes: int = 0,
    ) -> None:
        arrays, info, dtype = rig.arrays, rig.device.info, tensors.dtype
        self._given = SampleShape(case.x[1], case.x[2], case.x[3:])
        self._whole = tensors.layer.output_sample(self._given)
        self.operator = ConvOperator(
            tensors.layer, dtype, self._given, precision=precision, info=info, algorithm=algorithm
        )
        packed = [arrays.held(array) for array in self.operator.weights()]
        rows = dtype.itemsize * (math.prod(case.x) + math.prod(case.y))
        self.copies = copies_for(rows + sum(held.memory.nbytes for held in packed), cache_bytes)
        others = range(self.copies - 1)
        inputs = [tensors.x, *(arrays.held(_cloned(tensors.x.array)) for _ in others)]
        banks = [packed, *([arrays.held(_cloned(held.array)) for held in packed] for _ in others)]
        self._x = [DeviceArray.packed(held.memory, case.x, dtype) for held in inputs]
        self._weights = [tuple(held.memory for held in bank) for bank in banks]
        self.y = [arrays.empty(case.y, dtype) for _ in range(self.copies)]
        self._y = [DeviceArray.packed(held.memory, case.y, dtype) for held in self.y]
        # Of the stream, as a session's is: transforms take no other library's memory.
        wanted = self.operator.scratch_bytes(self._whole, self._whole.height, case.batch)
        scratch = rig.stream.allocate(wanted) if wanted else None
        self._counted = CountedStream(rig.stream)
        self._workspace = DeviceWorkspace(cast("Stream", self._counted), scratch, info, lambda: None)
        self._plan = self.operator.block_plan(self._given, self._whole)
        arrays.synchronize()  # the stream does not wait for whoever filled the tensors

    def ask(self, piece: int) -> None:
        """Asks for one feature map, of copy `piece`."""
        copy = piece % len(self._x)
        height = self._given.height
        run = Run((Rows(self._x[copy], 0),), height, 0, self._whole.height, self._plan)
        self.operator.compute(run, self._y[copy], self._workspace, self._weights[copy])

    def launches(self) -> int:
        """Kernels of one call."""
        before = self._counted.launches
        self.ask(0)
        return self._counted.launches - before


@dataclass(frozen=True)
class Measured:
    """An algorithm on a case.

    Attributes:
        error: largest error as a share of the promised bound.
        launches: kernels of one call.
        times: of one call; None where it was not timed.
    """

    error: float
    launches: int
    times: Times | None


def fitting(case: ConvCase, layer: Conv, dtype: DType, precision: Precision, info: DeviceInfo) -> list[str]:
    """Names of the algorithms that fit a case, the chosen one first."""
    given = SampleShape(case.x[1], case.x[2], case.x[3:])

    def taken(algorithm: str | None) -> str:
        operator = ConvOperator(layer, dtype, given, precision=precision, info=info, algorithm=algorithm)
        return operator.name

    return list(dict.fromkeys([taken(None), *(name for name in NAMES if taken(name) == name)]))


def tensors_of(rig: Rig, case: ConvCase, precision: str, *, integers: bool = False) -> Tensors:
    """A case's tensors for a precision of the table."""
    name, _ = PRECISIONS[precision]
    return Tensors.of(case, dtype_of(name), rig.arrays, integers=integers)


def measure(
    rig: Rig, case: ConvCase, precision: str, algorithm: str, tensors: Tensors, *, repeats: int = REPEATS
) -> Measured:
    """Validates an algorithm on a case, exact integers first where they are promised, and then times it.

    Args:
        rig: what it is measured on.
        case: the case.
        precision: as the table has it.
        algorithm: by name.
        tensors: the case's.
        repeats: measurements; 0 to time nothing.

    Raises:
        Wrong: it is not what is promised; it is not timed then.
    """
    allowed = PRECISIONS[precision][1]
    if allowed is Precision.HIGH:
        whole = tensors_of(rig, case, precision, integers=True)
        tried = LayerOnDevice(rig, case, whole, precision=allowed, algorithm=algorithm)
        tried.ask(0)
        y = rig.arrays.read(tried.y[0])
        demand_exact(rig.arrays, Computed(case, whole.dtype, whole.base, whole.weight, y))
        del tried, whole
    layer = LayerOnDevice(
        rig, case, tensors, precision=allowed, algorithm=algorithm, cache_bytes=rig.clock.cache_bytes
    )
    launches = layer.launches()
    y = rig.arrays.read(layer.y[0])
    computed = Computed(case, tensors.dtype, tensors.base, tensors.weight, y)
    error = demand_bounded(rig.arrays, computed, algorithm)
    return Measured(error, launches, rig.clock.times(layer.ask, layer.copies, repeats) if repeats else None)


def _cloned(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        copy: Any = np.array(cast("Any", array))
        return copy
    return array.clone()
