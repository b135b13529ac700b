"""What an algorithm of a convolution is: what it may compute, how it packs filters, which kernels it runs.

A `Case` (layer, types, device) says which algorithms fit; a `Problem` is one run of rows for one of them.
What fixes a neuron's bits (the order of its sum, its splits and transforms) may depend on the case and on
the shape of one sample; tiles and grids may also follow the batch and the run.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda.arguments import ConvArguments
from convservice_backends.cuda.device import Launch, Memory, Transform
from convservice_backends.cuda.source import Kernel

LONG = 1 << 13
"""Outputs that a line is taken to have where its length must play no part."""


@dataclass(frozen=True)
class Case:
    """A layer in its place.

    Attributes:
        layer: the convolution.
        given: dtype of the rows it reads: a float type.
        row_elements: elements of one row of its input over all channels.
        precision: what the caller allows.
        architecture: the device's compute capability, 10 * major + minor.
        reach: how far from 0 a coordinate may lie that a window looks at, on any axis.
        mirrored: rows that are held beside a window because padding reflects them.
        row_positions: outputs of one row of its map, of one filter.
    """

    layer: Conv
    given: DType
    row_elements: int
    precision: Precision
    architecture: int
    reach: int = 0
    mirrored: int = 0
    row_positions: int = 1

    @property
    def rows_under_one(self) -> int:
        """Rows that may be held for one output row."""
        layer = self.layer
        return (layer.kernel[0] - 1) * layer.dilation[0] + 1 + self.mirrored

    @property
    def sums(self) -> DType:
        """The type of its sums, thresholds and activation."""
        return self.given.accumulator

    @property
    def group_in(self) -> int:
        """Input channels of one group."""
        return self.layer.in_channels // self.layer.groups

    @property
    def group_out(self) -> int:
        """Filters of one group."""
        return self.layer.out_channels // self.layer.groups


@dataclass(frozen=True)
class Problem:
    """One run of rows to compute.

    Attributes:
        arguments: all that follows from layer, rows and place; an algorithm adds `scratch`, `filter_stride`,
            `splits` and `split_depth`.
        sample: the whole feature map of one sample; its rows are None while the height is not known.
        out: dtype of the rows written: the rows' own, or their accumulator's.
        scratch: working memory of at least `scratch_bytes`; None where that is 0.
        processors: the device's multiprocessors.
        holds: memory that the launches read and write.
    """

    arguments: ConvArguments
    sample: SampleShape
    out: DType
    scratch: Memory | None
    processors: int
    holds: tuple[Memory, ...]


class Algorithm(Protocol):
    """One way to compute a convolution."""

    name: ClassVar[str]

    def __init__(self, case: Case) -> None: ...

    @classmethod
    def fits(cls, case: Case) -> bool:
        """Whether it can compute this case, within the bound of the case's precision."""
        ...

    @property
    def packing(self) -> Hashable:
        """What the packed filters depend on beside the layer, the rows' dtype and the algorithm."""
        ...

    @property
    def quantum(self) -> int:
        """A run begins at a multiple of so many output rows; 1 where any rows give the same bits."""
        ...

    def pack(self) -> NDArray[Any]:
        """The filters as its kernels read them, an array of any shape, C-contiguous."""
        ...

    def scratch_bytes(self, sample: SampleShape, rows: int, samples: int) -> int:
        """Working memory for at most so many output rows of so many samples.

        Args:
            sample: the whole feature map of one sample.
            rows: output rows of one launch.
            samples: samples of one launch.
        """
        ...

    def launches(self, problem: Problem) -> Iterator[Launch | Transform]:
        """The kernels to run, in order, and transforms between them."""
        ...


def every_kernel() -> Iterator[Kernel]:
    """All forms that may ever be compiled; each algorithm's module has its own."""
    from convservice_backends.cuda import addition, elementwise, reducing, summing, windowed
    from convservice_backends.cuda.algorithms import ALGORITHMS

    for algorithm in ALGORITHMS:
        yield from algorithm.kernels()
    for layers in (elementwise, windowed, reducing, summing, addition):
        yield from layers.every_kernel()


def filters_as(layer: Conv, dtype: DType) -> NDArray[Any]:
    """The filter bank (groups, filters of a group, channels of a group, taps), in another type."""
    groups = layer.groups
    shape = (groups, layer.out_channels // groups, layer.in_channels // groups, -1)
    return np.ascontiguousarray(layer.weight.astype(dtype.numpy)).reshape(shape)


def square_positions(sample: SampleShape) -> int:
    """Outputs of one filter over a map that is taken to be as high as it is wide, a line to be long.

    What fixes bits may look at a sample's shape, but not at its height, which may not be told beforehand.
    """
    return math.prod(sample.rest) * min(sample.rest, default=LONG)


def ceil_div(size: int, part: int) -> int:
    """How many parts a size takes."""
    return -(-size // part)


def float_types() -> tuple[tuple[DType, DType], ...]:
    """The types of rows read and rows written that a kernel may be compiled for."""
    from convservice.dtypes import DTYPES

    floats = [dtype for dtype in DTYPES if dtype.is_float]
    return tuple((given, out) for given in floats for out in {given: None, given.accumulator: None})
