"""One convolution on a device, ready to be asked for again and again: by the project, and by cuDNN.

`LayerOnDevice` is given a case with its tensors, prepares the operator that the backend would use (or a
forced algorithm) and asks for it on device arrays, the operator alone: no session, no copies, no transfers.
`measure` validates it, and only then times it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from benchmarks.gpu_arrays import Arrays, Held, TorchArrays
from benchmarks.gpu_cases import ConvCase
from benchmarks.gpu_check import BASE_SAMPLES, Computed, demand_exact, error_share
from benchmarks.gpu_clocks import Clock, Times, copies_for
from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms import NAMES
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.convolution import ConvOperator
from convservice_backends.cuda.device import Device, DeviceInfo, Launch, Stream
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Run

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

    def transform(self, transform: Any) -> None:
        """See `device.Stream`; a transform counts as one launch, whatever its library makes of it."""
        self.launches += 1
        cast("Any", self._stream).transform(transform)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LayerOnDevice:
    """A convolution with its weights, on several copies of its tensors.

    Args:
        rig: what it is measured on.
        case: the case.
        tensors: its tensors.
        precision: what the caller allows.
        algorithm: one to force; the chosen one where not given.
        copies: of input, filters and feature map.
    """

    def __init__(
        self,
        rig: Rig,
        case: ConvCase,
        tensors: Tensors,
        *,
        precision: Precision,
        algorithm: str | None = None,
        copies: int = 1,
    ) -> None:
        arrays, info, dtype = rig.arrays, rig.device.info, tensors.dtype
        self._given = SampleShape(case.x[1], case.x[2], case.x[3:])
        self._whole = tensors.layer.output_sample(self._given)
        self.operator = ConvOperator(
            tensors.layer, dtype, self._given, precision=precision, info=info, algorithm=algorithm
        )
        packed = self.operator.weights()
        inputs = [tensors.x, *(arrays.held(_cloned(tensors.x.array)) for _ in range(copies - 1))]
        self._x = [DeviceArray.packed(held.memory, case.x, dtype) for held in inputs]
        self._kept = inputs
        self.y = [arrays.empty(case.y, dtype) for _ in range(copies)]
        self._y = [DeviceArray.packed(held.memory, case.y, dtype) for held in self.y]
        self._weights = [tuple(arrays.held(array).memory for array in packed) for _ in range(copies)]
        wanted = self.operator.scratch_bytes(self._whole, self._whole.height, case.batch)
        self._scratch = arrays.held(np.zeros(wanted, np.uint8)).memory if wanted else None
        self._counted = CountedStream(rig.stream)
        stream = cast("Stream", self._counted)
        self._workspace = DeviceWorkspace(stream, self._scratch, info, lambda: None)
        self._plan = self.operator.block_plan(self._given, self._whole)

    def ask(self, piece: int) -> None:
        """Asks for one feature map, of copy `piece`."""
        copy = piece % len(self._x)
        height = self._given.height
        run = Run(self._x[copy], 0, height, 0, self._whole.height, self._plan)
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
    rig: Rig, case: ConvCase, precision: str, algorithm: str, tensors: Tensors, *, timed: bool = True
) -> Measured:
    """Validates an algorithm on a case, exact integers first where they are promised, and then times it.

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
    copies = copies_for(case.moved(tensors.dtype.itemsize), rig.clock.cache_bytes)
    layer = LayerOnDevice(rig, case, tensors, precision=allowed, algorithm=algorithm, copies=copies)
    launches = layer.launches()
    y = rig.arrays.read(layer.y[0])
    computed = Computed(case, tensors.dtype, tensors.base, tensors.weight, y)
    error = error_share(rig.arrays, computed, algorithm)
    return Measured(error, launches, rig.clock.times(layer.ask, copies) if timed else None)


def peer_times(rig: Rig, case: ConvCase, precision: str, tensors: Tensors, layout: str) -> Times | None:
    """cuDNN's times through PyTorch, on the same tensors; None where there is no peer.

    Args:
        rig: what it is measured on.
        case: the case.
        precision: as the table has it; TF32 is allowed for "tf32" alone.
        tensors: the case's.
        layout: "contiguous", as the project reads them, or "channels_last": the tensors put so beforehand.
    """
    arrays, clock = rig.arrays, rig.peer_clock
    if clock is None or not isinstance(arrays, TorchArrays):
        return None
    torch = arrays.torch
    rest = arrays.convolution(case)
    copies = copies_for(case.moved(tensors.dtype.itemsize), clock.cache_bytes)

    def placed(tensor: Any) -> Any:
        if layout == "channels_last" and tensor.dim() > 3:
            kind = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            return tensor.clone(memory_format=kind)
        return tensor.clone()

    xs = [placed(tensors.x.array) for _ in range(copies)]
    weights = [placed(tensors.weight) for _ in range(copies)]
    maps: list[Any] = [None] * copies

    def ask(piece: int) -> None:
        maps[piece % copies] = rest(xs[piece % copies], weights[piece % copies])

    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    with (
        torch.no_grad(),
        torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=allowed),
    ):
        return clock.times(ask, copies)


def _cloned(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        copy: Any = np.array(cast("Any", array))
        return copy
    return array.clone()
