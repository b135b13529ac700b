"""Launches recorded, and played again: with another text of the kernel, in another order, under a sanitizer.

`record_layer` computes one layer on a device that notes, for every launch, the arguments and the memory
that they point at, before and after. `replay` runs such a launch again on memory of exactly those sizes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType, dtype_of
from convservice.errors import InternalError, Reason
from convservice.geometry import SampleShape
from convservice.layers import Layer, Linear
from convservice.wire.enums import Precision
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import DeviceInfo, Stream
from convservice_backends.cuda.operators import compute_whole, operator_for
from convservice_backends.cuda.source import STRUCTURES, Kernel
from convservice_emulator.build import Compiler, LaunchFailed, cpp_of
from convservice_emulator.device import INFO, EmulatedDevice
from convservice_emulator.memory import Block
from convservice_emulator.streams import Policy

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory that a launch was given.

    Attributes:
        address: of its first byte.
        before: what was in it.
        after: what was in it when the launch was done.
    """

    address: int
    before: Bytes
    after: Bytes


@dataclass(frozen=True, eq=False)
class Recorded:
    """One launch.

    Attributes:
        kernel: which.
        grid: blocks along x, y and z.
        arguments: the structure, as bytes.
        buffers: what its pointers point into.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: bytes
    buffers: tuple[Buffer, ...]

    @property
    def structure(self) -> str:
        """Name of the structure of arguments."""
        return STRUCTURES[self.kernel.takes].__name__


class RecordingDevice(EmulatedDevice):
    """A device that notes what it runs; see `EmulatedDevice`.

    Attributes:
        recorded: the launches, in order.
    """

    def __init__(self, compiler: Compiler, info: DeviceInfo = INFO) -> None:
        super().__init__(compiler, info, Policy.EAGER, order=0)
        self.recorded: list[Recorded] = []
        self._blocks: WeakSet[Block] = WeakSet()

    def new_block(self, nbytes: int) -> Block:
        """Bytes that it knows of."""
        block = super().new_block(nbytes)
        self._blocks.add(block)
        return block

    def run(self, kernel: Kernel, arguments: bytes, grid: tuple[int, int, int], blocks: list[Block]) -> None:
        """Runs and notes a kernel."""
        given = [self._block_at(pointer) for pointer in pointers(kernel, arguments).values() if pointer]
        given = list(dict.fromkeys(given))
        before = [block.data.copy() for block in given]
        super().run(kernel, arguments, grid, given)
        buffers = [
            Buffer(block.address, held, block.data.copy()) for block, held in zip(given, before, strict=True)
        ]
        self.recorded.append(Recorded(kernel, grid, arguments, tuple(buffers)))

    def _block_at(self, pointer: int) -> Block:
        for block in self._blocks:
            if block.address <= pointer < block.address + block.nbytes:
                return block
        raise InternalError(f"there is no device memory at {pointer:#x}", reason=Reason.INTERNAL)


def pointers(kernel: Kernel, arguments: bytes) -> dict[int, int]:
    """Offset to value of the pointers in a kernel's arguments."""
    offsets = _pointer_offsets(STRUCTURES[kernel.takes])
    return {offset: int.from_bytes(arguments[offset : offset + 8], "little") for offset in offsets}


def _pointer_offsets(kind: Any) -> Iterator[int]:
    """Where a ctypes type, a structure or an array of them, has pointers."""
    if kind is ctypes.c_uint64:
        yield 0
        return
    for index in range(getattr(kind, "_length_", 0)):
        first = index * ctypes.sizeof(kind._type_)
        yield from (first + offset for offset in _pointer_offsets(kind._type_))
    for name, field in getattr(kind, "_fields_", ()):
        first = getattr(kind, name).offset
        yield from (first + offset for offset in _pointer_offsets(field))


def record_layer(
    compiler: Compiler,
    layer: Layer,
    *inputs: NDArray[Any],
    algorithm: str | None = None,
    precision: Precision = Precision.HIGH,
    out_dtype: DType | None = None,
    info: DeviceInfo = INFO,
) -> tuple[Recorded, ...]:
    """Computes a layer's whole feature map in memory of exactly the sizes that it takes.

    Args:
        compiler: of the kernels.
        layer: the layer.
        inputs: (N, channels, *spatial) each, of float dtypes; for a fully connected layer, not flattened.
        algorithm: of a convolution; it must fit.
        precision: what the caller allows.
        out_dtype: of the feature map; the first input's where not given.
        info: what the device says that it is.
    """
    device = RecordingDevice(compiler, info)
    stream = device.stream()

    def upload(array: NDArray[Any]) -> Any:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory = stream.allocate(data.nbytes)
        stream.upload(data, memory)
        return memory

    x = inputs[0]
    dtypes = [dtype_of(array.dtype) for array in inputs]
    sample = SampleShape(x.shape[1], x.shape[2], tuple(x.shape[3:]))
    flat = SampleShape.of_vector(sample.elements) if isinstance(layer, Linear) else sample
    whole = layer.output_sample(flat)
    operator = operator_for(layer, dtypes, sample, precision=precision, info=info, algorithm=algorithm)
    if algorithm is not None and operator.name != algorithm:
        raise ValueError(f"{algorithm} does not compute this layer; {operator.name} does")
    weights = tuple(upload(array) for array in operator.weights())
    given = zip(inputs, dtypes, strict=True)
    rows = [DeviceArray.packed(upload(array), array.shape, dtype) for array, dtype in given]
    written = out_dtype or dtypes[0]
    shape = (x.shape[0], whole.channels, whole.height, *whole.rest)
    out = DeviceArray.packed(stream.allocate(math.prod(shape) * written.itemsize), shape, written)
    compute_whole(operator, rows, out, cast("Stream", stream), info=info, weights=weights)
    return tuple(device.recorded)


def replay(
    compiler: Compiler, launch: Recorded, source: str | None = None, order: int = 0, seed: int = 1
) -> tuple[Bytes, ...]:
    """Runs a launch again.

    Args:
        compiler: of the kernel.
        launch: the launch.
        source: another text of the kernel.
        order: of threads and blocks.
        seed: of the shuffling.

    Returns:
        What is in its buffers then.

    Raises:
        LaunchFailed: it did what a GPU would not survive, or wrote beside a buffer.
    """
    text = cpp_of(launch.kernel.source if source is None else source, launch.structure)
    library = compiler.library_of(text, launch.kernel.name)
    blocks = [Block(buffer.before.nbytes) for buffer in launch.buffers]
    for block, buffer in zip(blocks, launch.buffers, strict=True):
        block.data[:] = buffer.before
    moved = bytearray(launch.arguments)
    for offset, pointer in pointers(launch.kernel, launch.arguments).items():
        for block, buffer in zip(blocks, launch.buffers, strict=True):
            if buffer.address <= pointer < buffer.address + buffer.before.nbytes:
                moved[offset : offset + 8] = (pointer - buffer.address + block.address).to_bytes(8, "little")
    library.launch(bytes(moved), launch.grid, launch.kernel.dynamic_bytes, order, seed)
    for block in blocks:
        if trespass := block.trespass():
            raise LaunchFailed(f"kernel {launch.kernel.name}: {trespass}", reason=Reason.INTERNAL)
    return tuple(block.data for block in blocks)
