"""Blocks of a convolution on the processor: how the output is cut, and what input lies under a block.

Given a layer and a budget, `cut` shapes a block; `blocks_of` lists the blocks of a run; `gather` hands back
the input under one of them, padding included: a view where the input can be read where it is, else a copy
of just that part (`read`). There is no padded copy of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.errors import InternalError, Reason
from convservice.geometry import AxisWindow, PaddingMode, SampleShape
from convservice.layers import Conv, LocallyConnected
from convservice_backends.numpy.window import copy_window, needs_filling, segments
from convservice_backends.operators import Run
from convservice_backends.plan import BlockPlan

ALIGNMENT = 64
"""Bytes to which the parts of a worker's scratch are aligned: a cache line."""


@dataclass(frozen=True)
class TiledPlan(BlockPlan):
    """A plan of an operator whose bits do not depend on blocks: it cuts its work into tiles as it likes.

    Attributes:
        tile: sizes of what one task computes: channels, rows, and along the other output axes.
    """

    tile: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reach:
    """A range of virtual positions of one axis.

    Attributes:
        start: the first.
        count: how many.
        whole: size of the window that they lie at the beginning of.
    """

    start: int
    count: int
    whole: int


@dataclass(frozen=True)
class Block:
    """One block of several samples.

    Attributes:
        samples: which.
        first: where its output begins on every spatial axis.
        inside: its output sizes, what lies beyond the feature map left away.
    """

    samples: slice
    first: tuple[int, ...]
    inside: tuple[int, ...]

    def target(self, run: Run, out: NDArray[Any]) -> NDArray[Any]:
        """Where its output belongs, a view of the run's `out`."""
        start = (self.first[0] - run.first, *self.first[1:])
        where = (slice(a, a + n) for a, n in zip(start, self.inside, strict=True))
        view: NDArray[Any] = out[(self.samples, slice(None), *where)]
        return view


def cut(columns: int, rest: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The shape of a block of at most `columns` output positions of one channel.

    Args:
        columns: positions.
        rest: output sizes of all spatial axes but the first.

    Returns:
        Rows, and sizes along `rest`: whole axes from the last one on as far as they fit, then an even part
        of one, then single positions.
    """
    inner: list[int] = []
    left = columns
    for size in reversed(rest):
        if size <= left:
            inner.append(size)
            left //= size
        else:
            parts = -(-size // left)
            inner.append(-(-size // parts))
            left = 1
    return max(1, left), tuple(reversed(inner))


def blocks_of(run: Run, shape: tuple[int, ...], stack: int = 1) -> Iterator[Block]:
    """The blocks of a run whose output has `shape`, for `stack` samples at a time."""
    sizes = (run.blocks.rows, *run.blocks.inner)
    ends = (run.last, *shape[3:])
    starts = (run.first, *(0 for _ in shape[3:]))
    for sample in range(0, shape[0], stack):
        samples = slice(sample, min(sample + stack, shape[0]))
        for first in product(*(range(a, b, n) for a, b, n in zip(starts, ends, sizes, strict=True))):
            inside = tuple(min(n, b - a) for a, b, n in zip(first, ends, sizes, strict=True))
            yield Block(samples, first, inside)


def tile_of(run: Run) -> tuple[int, ...]:
    """The tile of a run that was planned with a `TiledPlan`."""
    if not isinstance(run.blocks, TiledPlan):
        raise InternalError("a run is computed with the operator's own plan", reason=Reason.INTERNAL)
    return run.blocks.tile


def tiles_of(tile: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The tiles that cover starts <= p < ends, as slices along each axis."""
    axes = zip(tile, starts, ends, strict=True)
    for first in product(*(range(start, end, size) for size, start, end in axes)):
        yield tuple(slice(a, min(a + size, end)) for a, size, end in zip(first, tile, ends, strict=True))


def spans(layer: Conv | LocallyConnected, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Input positions along each axis that output of these sizes looks at, gaps included."""
    axes = zip(sizes, layer.kernel, layer.stride, layer.dilation, strict=True)
    return tuple((size - 1) * s + (k - 1) * d + 1 for size, k, s, d in axes)


def windows_of(layer: Conv, run: Run) -> tuple[AxisWindow, ...]:
    """The layer's windows for the sample that a run belongs to."""
    return layer.windows(SampleShape(run.rows.shape[1], run.height, tuple(run.rows.shape[3:])))


def gather(
    layer: Conv,
    block: Block,
    run: Run,
    scratch: NDArray[np.uint8],
    dtype: np.dtype[Any],
    *,
    sizes: tuple[int, ...],
) -> NDArray[Any]:
    """The input under a block, (samples, channels, *spans(sizes)), in `dtype`, zero beyond `block.inside`.

    Args:
        layer: the convolution.
        block: which block.
        run: the rows held.
        scratch: where a copy may go.
        dtype: the type wanted.
        sizes: the output sizes of a full block.
    """
    axes = [
        segments(first * window.stride - window.before, count, size, layer.padding_mode)
        for first, window, count, size in zip(
            block.first,
            windows_of(layer, run),
            spans(layer, block.inside),
            (run.height, *run.rows.shape[3:]),
            strict=True,
        )
    ]
    whole = spans(layer, sizes)
    source = run.rows[block.samples]
    if source.dtype == dtype and _is_packed(source) and not needs_filling(axes, whole):
        (rows,), *rest = axes
        at = slice(rows.source.start - run.first_row, rows.source.stop - run.first_row)
        view: NDArray[Any] = source[(slice(None), slice(None), at, *(piece.source for (piece,) in rest))]
        return view
    window = carve(scratch, (source.shape[0], source.shape[1], *whole), dtype)
    copy_window(source, run.first_row, axes, window)
    return window


def _is_packed(rows: NDArray[Any]) -> bool:
    """Whether the rows of each channel lie as they do in a buffer of the session: what a product reads must
    lie the same way whoever gave it, or its bits would depend on that."""
    step = rows.itemsize
    for axis in range(rows.ndim - 1, 1, -1):
        if rows.strides[axis] != step:
            return False
        step *= rows.shape[axis]
    return rows.strides[1] >= step


def read(
    source: NDArray[Any],
    first_row: int,
    sizes: Sequence[int | None],
    axes: Sequence[Reach],
    out: NDArray[Any],
    *,
    mode: PaddingMode = PaddingMode.ZEROS,
    fill: float = 0.0,
) -> None:
    """Copies a part of the input, padding included, to `out`, (samples, channels, *wholes of the axes).

    Args:
        source: (samples, channels, rows held, *rest).
        first_row: index in the sample of the first row held.
        sizes: of the sample's spatial axes; its height None while it is not known.
        axes: what part, along each of them.
        out: written whole.
        mode: what the padding reads.
        fill: what stands where nothing real is read.
    """
    pieces = [segments(axis.start, axis.count, size, mode) for axis, size in zip(axes, sizes, strict=True)]
    copy_window(source, first_row, pieces, out, fill)


def carve(scratch: NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of that shape at the beginning of a worker's scratch."""
    size = math.prod(shape)
    return scratch[: size * dtype.itemsize].view(dtype).reshape(shape)


def aligned(size: int, dtype: np.dtype[Any]) -> int:
    """Bytes of `size` elements, rounded up to a cache line."""
    return -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT
