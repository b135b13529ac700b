"""The input under a block, padding included, gathered by slices.

A block looks at a range of virtual positions along each axis. `segments` says which real positions stand
there, as a few slices; `copy_window` copies them, and zeros elsewhere. There is no padded copy of the
input: only of what one block sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convservice.geometry import PaddingMode


class Segment(NamedTuple):
    """Neighbouring positions of a window and the real positions that they read.

    Attributes:
        target: slice of the window.
        source: slice of the input, of the same length, reversed for a mirrored edge; of length 1 for a
            repeated one.
    """

    target: slice
    source: slice


def segments(start: int, count: int, size: int | None, mode: PaddingMode) -> list[Segment]:
    """The segments of the virtual positions start <= p < start + count of an axis.

    Args:
        start: first virtual position.
        count: how many.
        size: positions that the input has; None while they are not known, and all that are read are real.
        mode: what positions outside read.
    """
    stop = start + count
    end = stop if size is None else size
    found: list[Segment] = []
    first, last = max(start, 0), min(stop, end)
    if mode is not PaddingMode.ZEROS and start < 0:
        edge = min(stop, 0)
        found.append(Segment(slice(0, edge - start), _before(start, edge, mode)))
    if last > first:
        found.append(Segment(slice(first - start, last - start), slice(first, last)))
    if mode is not PaddingMode.ZEROS and stop > end:
        edge = max(start, end)
        found.append(Segment(slice(edge - start, count), _after(edge, stop, end, mode)))
    return found


def _before(start: int, stop: int, mode: PaddingMode) -> slice:
    if mode is PaddingMode.REPLICATE:
        return slice(0, 1)
    return slice(-start, -stop, -1)


def _after(start: int, stop: int, size: int, mode: PaddingMode) -> slice:
    if mode is PaddingMode.REPLICATE:
        return slice(size - 1, size)
    low = 2 * (size - 1) - (stop - 1)
    return slice(2 * (size - 1) - start, low - 1 if low else None, -1)


def needs_filling(axes: Sequence[Sequence[Segment]], spans: tuple[int, ...]) -> bool:
    """Whether a window of these spans is more than one plain slice of the input."""
    return any(
        len(pieces) != 1 or pieces[0].target != slice(0, span) or pieces[0].source.step == -1
        for pieces, span in zip(axes, spans, strict=True)
    ) or any(
        pieces[0].source.stop - pieces[0].source.start != span
        for pieces, span in zip(axes, spans, strict=True)
    )


def copy_window(
    rows: NDArray[Any],
    first_row: int,
    axes: Sequence[Sequence[Segment]],
    window: NDArray[Any],
    fill: float = 0.0,
) -> None:
    """Copies what a block looks at.

    Args:
        rows: (samples, channels, rows held, *rest).
        first_row: index in the sample of the first row held.
        axes: the segments of every spatial axis.
        window: (samples, channels, *spans), written whole.
        fill: what stands where nothing real is read.
    """
    covered = all(
        sum(piece.target.stop - piece.target.start for piece in pieces) == span
        for pieces, span in zip(axes, window.shape[2:], strict=True)
    )
    if not covered:
        window.fill(fill)
    everything = slice(None)
    for pieces in product(*axes):
        at, *others = (piece.source for piece in pieces)
        shifted = slice(at.start - first_row, None if at.stop is None else at.stop - first_row, at.step)
        if shifted.stop is not None and shifted.stop < 0:
            shifted = slice(shifted.start, None, at.step)
        target = window[(everything, everything, *(piece.target for piece in pieces))]
        np.copyto(target, rows[(everything, everything, shifted, *others)], casting="unsafe")
