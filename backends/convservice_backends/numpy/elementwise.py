"""Elementwise work on blocks: activations, sums of feature maps, and the one rounding at the end.

Given a contiguous block in the accumulator's type, `activate` applies a function in place and `store`
rounds it once into its destination. Each element is computed by itself, so its bits do not depend on where
in a block it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import Activation, Add
from convservice_backends.numpy.blocks import tiles_of
from convservice_backends.operators import Run, Task, Workspace
from convservice_backends.plan import BlockPlan

InPlace = Callable[[NDArray[Any]], None]

BLOCK_ELEMENTS = 1 << 17
"""Elements computed at once: what fits a core's cache beside its destination."""

CONVERTED_ELEMENTS = 1 << 14
"""Elements rounded at a time where a map leaves in another dtype than it is kept in."""


def temporary_bytes(elements: int, accumulator: DType) -> int:
    """What an activation and `store` allocate beside a block of so many elements: at most a copy, a mask."""
    return elements * (accumulator.itemsize + 1)


def activation_function(activation: Activation) -> InPlace | None:
    """The in-place function of an activation; None for `linear`. Imports SciPy where it is needed."""
    if activation.function == "linear":
        return None
    if activation.function == "leaky_relu":
        return _leaky_relu(activation.negative_slope)
    if activation.function == "relu":
        return _relu
    if activation.function == "tanh":
        return _tanh
    import scipy.special

    special: Any = scipy.special

    def sigmoid(x: NDArray[Any]) -> None:
        special.expit(x, out=x)

    def silu(x: NDArray[Any]) -> None:
        np.multiply(x, special.expit(x), out=x)

    def gelu(x: NDArray[Any]) -> None:
        tail = x * x.dtype.type(-(0.5**0.5))
        special.erfc(tail, out=tail)  # erfc keeps its digits where 1 + erf cancels
        np.multiply(tail, x.dtype.type(0.5), out=tail)  # before the product, which may leave the range
        np.multiply(x, tail, out=x)

    return {"sigmoid": sigmoid, "silu": silu, "gelu": gelu}[activation.function]


def _relu(x: NDArray[Any]) -> None:
    np.maximum(x, 0, out=x)
    # The maximum of -0 and 0 is either, as the vector unit and the tail loop please; adding 0 makes it +0.
    np.add(x, 0, out=x)


def _tanh(x: NDArray[Any]) -> None:
    np.tanh(x, out=x)


def _leaky_relu(slope: float) -> InPlace:
    def leaky_relu(x: NDArray[Any]) -> None:
        kept = x > 0
        np.multiply(x, x.dtype.type(slope), out=x, where=np.logical_not(kept, out=kept))

    return leaky_relu


def store(block: NDArray[Any], out: NDArray[Any]) -> None:
    """Rounds a block in the accumulator's type once into `out`; the block is used up.

    Integers: half to even, then saturated; NaN becomes 0.
    """
    if out.dtype.kind in "iu":
        limits = np.iinfo(out.dtype)
        np.copyto(block, 0, where=np.isnan(block))
        np.rint(block, out=block)
        np.clip(block, limits.min, limits.max, out=block)
    np.copyto(out, block, casting="unsafe")


def convert(array: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """An array rounded to a dtype; the array itself where it has that dtype."""
    if array.dtype == dtype.numpy:
        return array
    out = np.empty(array.shape, dtype.numpy)
    if array.flags.c_contiguous:
        copy_rounded(array.reshape(1, -1), out.reshape(1, -1), dtype_of(array.dtype))
    else:
        for sample, into in zip(array, out, strict=True):
            copy_rounded(sample, into, dtype_of(array.dtype))
    return out


def copy_rounded(source: NDArray[Any], target: NDArray[Any], through: DType) -> None:
    """Copies a sample's rows (channels, ...), rounded once.

    Args:
        source: each channel contiguous.
        target: likewise, of the same shape.
        through: the type in which an integer result is rounded and saturated.
    """
    elements = math.prod(source.shape[1:])
    with np.errstate(all="ignore"):
        if elements <= CONVERTED_ELEMENTS:
            step = CONVERTED_ELEMENTS // max(1, elements)
            for first in range(0, len(source), step):
                some = slice(first, first + step)
                store(source[some].astype(through.numpy, order="C"), target[some])
            return
        for channel, channel_into in zip(source, target, strict=True):
            flat, into = channel.reshape(-1), channel_into.reshape(-1)
            for first in range(0, elements, CONVERTED_ELEMENTS):
                part = slice(first, first + CONVERTED_ELEMENTS)
                store(flat[part].astype(through.numpy), into[part])


class NumpyArrays:
    """NumPy's arrays, as stages and sessions ask for them; see `arrays.Arrays`."""

    moved_bytes = 1 << 18

    def empty(self, shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
        """A new array."""
        return np.empty(shape, dtype.numpy)

    def copy(self, source: NDArray[Any], target: NDArray[Any]) -> None:
        """Fills `target` with `source`."""
        target[...] = source

    def convert(self, array: NDArray[Any], dtype: DType) -> NDArray[Any]:
        """The array rounded to a dtype; the array itself where it has that dtype."""
        return convert(array, dtype)


class ElementwiseOperator:
    """Rows in, the same rows out: an activation of one input, or the sum of several.

    Args:
        layer: the layer.
        accumulator: the type it computes in.
    """

    nbytes = 0

    def __init__(self, layer: Activation | Add, accumulator: DType) -> None:
        self._function = activation_function(layer.activation if isinstance(layer, Add) else layer)
        self._accumulator = accumulator

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits."""
        elements = max(BLOCK_ELEMENTS, math.prod(given.rest))
        own = elements * self._accumulator.itemsize
        temporary = own + temporary_bytes(elements, self._accumulator)
        return BlockPlan("elementwise", 1, out.rest, 0, temporary, any_rows=True)

    def compute(self, run: Run, out: NDArray[Any], workspace: Workspace) -> None:
        """Computes rows first <= i < last, so many samples, channels and rows at a time as a core's cache
        holds."""
        samples, channels, rows = out.shape[:3]
        row = math.prod(out.shape[3:])
        rows_at_once = max(1, min(rows, BLOCK_ELEMENTS // row))
        channels_at_once = max(1, min(channels, BLOCK_ELEMENTS // (row * rows_at_once)))
        stack = max(1, BLOCK_ELEMENTS // (row * rows_at_once * channels_at_once))
        tasks: list[Task] = []
        tile = (stack, channels_at_once, rows_at_once)
        for *some, part in tiles_of(tile, (0, 0, run.first), (samples, channels, run.last)):
            given = [
                port.array[(*some, slice(part.start - port.first, part.stop - port.first))]
                for port in run.ports
            ]
            into = slice(part.start - run.first, part.stop - run.first)
            tasks.append(self._task(given, out[(*some, into)]))
        workspace.run(tasks, float(out.size) * len(run.ports))

    def _task(self, given: Sequence[NDArray[Any]], out: NDArray[Any]) -> Task:
        def task(_: int) -> None:
            with np.errstate(all="ignore"):
                block = np.array(given[0], dtype=self._accumulator.numpy, order="C", copy=True)
                for other in given[1:]:
                    np.add(block, other, out=block, casting="unsafe", dtype=self._accumulator.numpy)
                if self._function is not None:
                    self._function(block)
                store(block, out)

        return task


__all__ = ["ElementwiseOperator", "NumpyArrays", "activation_function", "convert", "store", "temporary_bytes"]
