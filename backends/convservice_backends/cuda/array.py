"""Arrays in device memory, as far as rows need them: a shape, three strides, slices.

A `DeviceArray` is (samples, channels, rows, *rest) with every row packed; slicing its first three axes gives
views. It holds its memory and does no arithmetic: kernels are given its address and strides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from convservice.dtypes import DType
from convservice_backends.cuda.device import Memory

Index = slice | tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """Elements in device memory.

    Attributes:
        memory: where.
        dtype: of the elements.
        shape: (samples, channels, rows, *rest).
        strides: elements between neighbouring samples, channels and rows; a row of a channel is packed.
        offset: elements before the first.
    """

    memory: Memory
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, int, int]
    offset: int = 0

    @classmethod
    def packed(cls, memory: Memory, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """A C-contiguous array at the beginning of `memory`."""
        row = math.prod(shape[3:])
        return cls(memory, dtype, shape, (shape[1] * shape[2] * row, shape[2] * row, row))

    @property
    def address(self) -> int:
        """Of the first element."""
        return self.memory.address + self.offset * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Index) -> DeviceArray:
        """A view: slices of step 1 along the first axes."""
        shape, offset = list(self.shape), self.offset
        for axis, part in enumerate(index if isinstance(index, tuple) else (index,)):
            start, stop, _ = part.indices(shape[axis])
            offset += start * self.strides[axis] if start else 0
            shape[axis] = max(0, stop - start)
        return replace(self, shape=tuple(shape), offset=offset)
