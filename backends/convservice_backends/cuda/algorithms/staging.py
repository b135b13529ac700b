"""What of its input a run reads: the window of each axis that is worth copying before it is computed with.

Given are the axes of a run; handed on is, for each, which elements to copy, and the same axis in coordinates
that count from the first element copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from convservice_backends.cuda.arguments import AxisArguments, ConvArguments

ZEROS, REFLECT = 0, 1
"""Numbers of `PaddingMode` in common.cuh."""


@dataclass(frozen=True)
class AxisStaging:
    """The elements of one axis that a run reads.

    Attributes:
        first: the first of them, from the first element held.
        count: how many are copied.
        every: the step between them; beyond 1 where a stride leaves out elements that no weight looks at.
        merged: whether all that one output's window reads along the axis is put in one place.
    """

    first: int
    count: int
    every: int = 1
    merged: bool = False

    def apply(self, axis: AxisArguments, step: int) -> None:
        """Changes an axis to coordinates of the copied elements, `step` apart."""
        axis.step = step
        if self.merged:
            axis.kernel = 1
        if self.merged or self.every > 1:
            axis.start, axis.low, axis.high, axis.stride = 0, 0, self.count, 1
        else:
            axis.start, axis.low, axis.high = (
                axis.start - self.first,
                axis.low - self.first,
                axis.high - self.first,
            )


def staged_axes(arguments: ConvArguments, *, merged: bool = False) -> tuple[AxisStaging, ...]:
    """What each of the three axes reads.

    Args:
        arguments: the run.
        merged: whether the windows along the innermost axis are each put in one place.
    """
    *outer, inner = arguments.axes
    last = AxisStaging(0, inner.count, merged=True) if merged else _staged(inner, arguments.padding)
    return (*(_staged(axis, arguments.padding) for axis in outer), last)


def _staged(axis: AxisArguments, padding: int) -> AxisStaging:
    last = axis.start + (axis.count - 1) * axis.stride + (axis.kernel - 1) * axis.dilation
    if axis.kernel == 1 and axis.stride > 1 and axis.low <= axis.start and last < axis.high:
        return AxisStaging(axis.start, axis.count, axis.stride)
    read = list(_read(axis, last, padding))
    return AxisStaging(min(read), max(read) - min(read) + 1) if read else AxisStaging(0, 0)


def _read(axis: AxisArguments, last: int, padding: int) -> Iterator[int]:
    """Both ends of what is read by the coordinates inside, before and behind the real elements."""
    inside = max(axis.start, axis.low), min(last, axis.high - 1)
    before, behind = (axis.start, min(last, axis.low - 1)), (max(axis.start, axis.high), last)
    if inside[0] <= inside[1]:
        yield from inside
    if padding == ZEROS:
        return
    for ends, edge in ((before, axis.low), (behind, axis.high - 1)):
        if ends[0] <= ends[1]:
            yield from (2 * edge - end if padding == REFLECT else edge for end in ends)


def row_start(arguments: ConvArguments, itemsize: int) -> int | None:
    """Where a run's positions begin that follow one another, and in which nothing is left out or padding.

    Returns:
        The first element, from `input` on; None where the windows are not 1x1, positions do not follow one
        another, or do not come in aligned fours.
    """
    size, first = 1, 0
    for axis in reversed(arguments.axes):
        last = axis.start + (axis.count - 1) * axis.stride
        if axis.kernel > 1 or axis.start < axis.low or last >= axis.high:
            return None
        if axis.count > 1 and axis.stride * axis.step != size:
            return None
        first += axis.start * axis.step
        size *= axis.count
    places = arguments.positions | arguments.input_sample | arguments.input_channel
    if places % 4 or (arguments.input + first * itemsize) % (4 * itemsize):
        return None
    return first
