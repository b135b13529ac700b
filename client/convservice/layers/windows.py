"""Windows of layers that are no plain sliding window, and what all windows have in common.

A window says how the neurons along one axis look at it. `AxisWindow` is the one of convolution and pooling;
here are the transposed one, where several neurons share a position, and the one that takes an axis whole.
Given windows and a sample, the functions hand back output sizes with every limit checked, the rows that a
layer holds, and receptive fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from convservice.counting import window_pairs
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import (
    MAX_SIZE,
    AxisWindow,
    PaddingMode,
    SampleShape,
    check_padding,
    first_row_kept,
    real_span,
)


class RowWindow(Protocol):
    """How the neurons along one axis look at it."""

    @property
    def extent(self) -> int:
        """Positions from the first weight to the last."""
        ...

    @property
    def before(self) -> int:
        """Padding before the first element."""
        ...

    @property
    def after(self) -> int:
        """Padding after the last."""
        ...

    def output_size(self, size: int) -> int:
        """Neurons along an axis of `size` positions, at least 0."""
        ...

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The half-open range of virtual positions that the neurons first <= i < last look at; both ends
        never decrease."""
        ...

    def positions(self, index: int) -> range:
        """The virtual positions that neuron `index` looks at, in ascending order."""
        ...

    def reach(self, rows: int) -> int:
        """Most positions, from the first to the last, that `rows` neighbouring neurons look at."""
        ...

    def connections(self, size: int) -> int:
        """Weights, over all neurons, that lie on one of the `size` positions of the axis."""
        ...


@dataclass(frozen=True)
class TransposedWindow:
    """A sliding window turned round: position p contributes to the neurons p*stride - before + k*dilation.

    So neuron i looks at the positions (i + before - k*dilation) / stride that are integers.

    Attributes:
        kernel: weights along the axis.
        stride: step between the neurons that neighbouring positions contribute to.
        dilation: step between neighbouring weights.
        before: neurons left out at the beginning.
        after: neurons left out at the end.
        output_padding: neurons added at the end.
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    output_padding: int = 0

    @property
    def extent(self) -> int:
        """Neurons from the first to the last that one position contributes to."""
        return (self.kernel - 1) * self.dilation + 1

    def output_size(self, size: int) -> int:
        """(size - 1) * stride - before - after + extent + output_padding, at least 0: the formula of
        PyTorch's `torch.nn.ConvTranspose2d`, section "Shape"."""
        room = (size - 1) * self.stride - self.before - self.after
        return max(0, room + self.extent + self.output_padding)

    def input_size(self, size: int) -> int:
        """Positions of the shortest axis that gives `size` neurons."""
        room = size + self.before + self.after - self.extent - self.output_padding
        return max(1, -(-room // self.stride) + 1)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The half-open range of virtual positions that the neurons first <= i < last look at; it may be
        empty."""
        start = -(-(first + self.before - self.extent + 1) // self.stride)
        return start, (last - 1 + self.before) // self.stride + 1

    def positions(self, index: int) -> range:
        """The virtual positions that neuron `index` looks at, in ascending order; there may be none."""
        at, period = index + self.before, math.gcd(self.stride, self.dilation)
        if at % period:
            return range(0)
        # k * dilation = at modulo stride, solved for the smallest k; the others follow every stride / period
        turns = self.stride // period
        inverse = pow(self.dilation // period, -1, turns) if turns > 1 else 0
        first = (at // period) * inverse % turns
        if first >= self.kernel:
            return range(0)
        count = (self.kernel - 1 - first) // turns + 1
        step = self.dilation // period
        highest = (at - first * self.dilation) // self.stride
        return range(highest - (count - 1) * step, highest + 1, step)

    def reach(self, rows: int) -> int:
        """Most positions, from the first to the last, that `rows` neighbouring neurons look at."""
        return -(-(rows - 1 + self.extent) // self.stride)

    def connections(self, size: int) -> int:
        """Weights, over all neurons, that lie on one of the `size` positions of the axis."""
        return window_pairs(
            size,
            self.output_size(size),
            kernel=self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            before=self.before,
        )


@dataclass(frozen=True)
class WholeWindow:
    """One neuron that looks at the whole axis.

    Attributes:
        size: of the axis; None while it is not known.
    """

    size: int | None
    before: int = 0
    after: int = 0

    @property
    def extent(self) -> int:
        """The size; `MAX_SIZE` stands for one that is not known."""
        return MAX_SIZE if self.size is None else self.size

    def output_size(self, size: int) -> int:
        """1."""
        return 1

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Everything."""
        return 0, self.extent

    def positions(self, index: int) -> range:
        """Everything."""
        return range(self.extent)

    def reach(self, rows: int) -> int:
        """Everything."""
        return self.extent

    def connections(self, size: int) -> int:
        """Every position once."""
        return size


def output_sizes(
    windows: Sequence[RowWindow], sample: SampleShape, what: str, mode: PaddingMode = PaddingMode.ZEROS
) -> tuple[int | None, ...]:
    """The output's spatial sizes, the first None where the sample's is.

    Args:
        windows: one per spatial axis.
        sample: the input.
        what: what spans the extent, such as "the filter".
        mode: what the padding reads.

    Raises:
        InvalidRequest: `OUTPUT_EMPTY` for an output of size 0, `SIZE_OVERFLOW` for one above `MAX_SIZE`,
            `PADDING_TOO_LARGE` for a reflection that is not narrower than its input.
    """
    sizes: list[int | None] = []
    for axis, (window, size) in enumerate(zip(windows, sample.spatial, strict=True)):
        if size is None:
            sizes.append(None)
            continue
        where = f"spatial axis {axis}"
        out = window.output_size(size)
        if out < 1:
            raise _empty(window, size, axis, what)
        check_padding(window.before, window.after, size, mode, where)
        sizes.append(checked_size(out, where))
    return tuple(sizes)


def sample_of(channels: int, sizes: Sequence[int | None]) -> SampleShape:
    """The sample shape of feature maps with these spatial sizes, of which only the first may be None."""
    return SampleShape(channels, sizes[0], tuple(size for size in sizes[1:] if size is not None))


def checked_size(size: int, where: str) -> int:
    """`size`, which no output may exceed `MAX_SIZE` in.

    Raises:
        InvalidRequest: `SIZE_OVERFLOW`.
    """
    if size > MAX_SIZE:
        raise InvalidRequest(
            f"the output's {where} would have size {size}; a size is at most {MAX_SIZE}",
            reason=Reason.SIZE_OVERFLOW,
            metadata={"size": str(size), "limit": str(MAX_SIZE)},
            field="sample_shape",
        )
    return size


def _empty(window: RowWindow, size: int, axis: int, what: str) -> InvalidRequest:
    if isinstance(window, TransposedWindow):
        full = (size - 1) * window.stride + window.extent + window.output_padding
        message = (
            f"the output would be empty: spatial axis {axis} would have size {full}, of which padding"
            f" ({window.before}, {window.after}) leaves nothing"
        )
        metadata = {"axis": str(axis), "size": str(full), "padding": f"({window.before}, {window.after})"}
    else:
        padded = size + window.before + window.after
        message = (
            f"the output would be empty: spatial axis {axis} has size {size}, {padded} with padding, and"
            f" {what} spans {window.extent}"
        )
        if isinstance(window, AxisWindow):
            message += f" (kernel {window.kernel}, dilation {window.dilation})"
        metadata = {"axis": str(axis), "size": str(padded), "extent": str(window.extent)}
    return InvalidRequest(message, reason=Reason.OUTPUT_EMPTY, metadata=metadata, field="sample_shape")


def rows_held(window: RowWindow, height: int | None, mode: PaddingMode = PaddingMode.ZEROS) -> int:
    """Most input rows that a layer holds between two of its output rows, whatever the height.

    Args:
        window: along the first spatial axis.
        height: of the input; None where it is not known.
        mode: what the padding reads.
    """
    if not isinstance(window, AxisWindow):
        held = max(1, window.reach(1))
        return held if height is None else min(held, height)
    extent, after = window.extent, window.after
    # What is held is linear in the row between the places where a window's first position passes these.
    turns = [0, -extent, 1 - extent, (1 - extent) // 2, 1 + after - extent, -after]
    if height is not None:
        turns += [height - extent, height, height - 1, height - 1 - after, 1 - height]
    last = MAX_SIZE if height is None else window.output_size(height) - 1
    near = {(turn + window.before) // window.stride + offset for turn in turns for offset in range(-1, 3)}
    held = 1
    for row in {0, last, *(row for row in near if 0 <= row <= last)}:
        start, stop = window.span(row, row + 1)
        seen = real_span(start, stop, height, mode)[1]
        held = max(held, seen - first_row_kept(start, after, seen, height, mode))
    return held
