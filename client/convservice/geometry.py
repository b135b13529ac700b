"""Where a neuron looks: windows, padding, rows. Pure arithmetic on integers.

Given kernel, stride, padding and dilation of an axis it hands back output sizes, the input positions that
an output position needs, and which of them must still be kept. Client, server and backends all ask here,
so that the number of neurons, the rows a stage holds and the shapes on the wire follow from one rule.

Positions come in two kinds. A *virtual* position counts from the first real element and may lie in the
padding: it runs from `-before` to `size + after`. A *real* position is one that the input has. A
`PaddingMode` says which real position a virtual one reads, if any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from convservice.counting import window_pairs
from convservice.errors import InvalidRequest, Reason

MAX_RANK = 3
"""Spatial axes that data may have: 1-D, 2-D and 3-D."""

MAX_SIZE = 2**31 - 1
"""Largest size, stride, padding, dilation or kernel of an axis, in elements."""

Same = Literal["same"]
Pads = tuple[tuple[int, int], ...]


class PaddingMode(StrEnum):
    """What a window reads beyond the edge: zeros, the mirrored input, or the edge repeated."""

    ZEROS = "zeros"
    REFLECT = "reflect"
    REPLICATE = "replicate"


@dataclass(frozen=True)
class SampleShape:
    """The shape of one sample, always in the order (channels, rows, *rest).

    A vector has channels alone, no spatial axes; it flows as one row of them: rows is 1, rest empty.

    Attributes:
        channels: number of channels.
        rows: size of the first spatial axis; None while a stream's height is not known.
        rest: sizes of the other spatial axes.
        vector: whether it has no spatial axes.
    """

    channels: int
    rows: int | None
    rest: tuple[int, ...] = ()
    vector: bool = False

    @classmethod
    def of_vector(cls, features: int) -> SampleShape:
        """The shape of a vector of so many features."""
        return cls(features, 1, (), vector=True)

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.spatial)

    @property
    def row_elements(self) -> int:
        """Elements in one row over all channels."""
        return self.channels * math.prod(self.rest)

    @property
    def height(self) -> int:
        """The rows, which must be known."""
        if self.rows is None:
            raise InvalidRequest(
                "the height of the input is not known yet, and this needs it",
                reason=Reason.HEIGHT_REQUIRED,
            )
        return self.rows

    @property
    def elements(self) -> int:
        """Elements in the whole sample; its rows must be known."""
        return self.row_elements * self.height

    @property
    def spatial(self) -> tuple[int | None, ...]:
        """Sizes of all spatial axes."""
        return () if self.vector else (self.rows, *self.rest)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *spatial) as users see it; its rows must be known."""
        return (self.channels,) if self.vector else (self.channels, self.height, *self.rest)

    def with_rows(self, rows: int | None) -> SampleShape:
        """The same sample with another height; a vector stays what it is."""
        return self if self.vector else SampleShape(self.channels, rows, self.rest)

    def __str__(self) -> str:
        sizes = (self.channels, *("?" if size is None else size for size in self.spatial))
        return "(" + ", ".join(str(size) for size in sizes) + ("," if len(sizes) == 1 else "") + ")"


@dataclass(frozen=True)
class AxisWindow:
    """How the neurons along one axis look at it: neuron i sees i*stride - before + k*dilation, k < kernel.

    Attributes:
        kernel: weights along the axis.
        stride: step between neighbouring neurons.
        dilation: step between neighbouring weights.
        before: padding before the first element.
        after: padding after the last.
        ceil_mode: whether a last neuron may look beyond the padding, as in PyTorch's pooling; never one that
            would begin beyond the last element.
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    ceil_mode: bool = False

    @property
    def extent(self) -> int:
        """Positions from the first weight to the last: (kernel - 1) * dilation + 1."""
        return (self.kernel - 1) * self.dilation + 1

    def output_size(self, size: int) -> int:
        """Neurons along the axis: floor((size + before + after - extent) / stride) + 1, at least 0.

        The formula is PyTorch's `torch.nn.Conv2d`, section "Shape"; with `ceil_mode` the quotient is rounded
        up, without the last neuron where it would begin beyond the last element.
        """
        room = size + self.before + self.after - self.extent
        if not self.ceil_mode:
            return room // self.stride + 1 if room >= 0 else 0
        count = max(0, -(-room // self.stride) + 1)
        return count - 1 if count and (count - 1) * self.stride >= size + self.before else count

    def reach(self, rows: int) -> int:
        """Most positions, from the first to the last, that `rows` neighbouring neurons look at."""
        return (rows - 1) * self.stride + self.extent

    def connections(self, size: int) -> int:
        """Weights, over all neurons, that lie on one of the `size` positions of the axis."""
        return window_pairs(
            self.output_size(size),
            size,
            kernel=self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            before=self.before,
        )

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The half-open range of virtual positions that the neurons first <= i < last look at."""
        start = first * self.stride - self.before
        return start, start + (last - first - 1) * self.stride + self.extent

    def positions(self, index: int) -> range:
        """The virtual positions that neuron `index` looks at, one per weight."""
        start = index * self.stride - self.before
        return range(start, start + self.extent, self.dilation)


def same_padding(size: int | None, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """The padding (before, after) that makes the output ceil(size / stride).

    In all max((ceil(size/stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0), half of it rounded
    down before and the rest after: PyTorch's at stride 1, TensorFlow's beyond.

    Raises:
        InvalidRequest: `HEIGHT_REQUIRED` when `size` is None and the stride is beyond 1.
    """
    extent = (kernel - 1) * dilation + 1
    if stride == 1:
        total = extent - 1
    elif size is None:
        raise InvalidRequest(
            f"padding 'same' with stride {stride} on the first axis needs the height, which is not known",
            reason=Reason.HEIGHT_REQUIRED,
            metadata={"stride": str(stride)},
        )
    else:
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2


def real_position(position: int, size: int, mode: PaddingMode) -> int | None:
    """The real position that a virtual one reads, or None where it reads the value 0."""
    if 0 <= position < size:
        return position
    if mode is PaddingMode.REFLECT:
        return -position if position < 0 else 2 * (size - 1) - position
    if mode is PaddingMode.REPLICATE:
        return 0 if position < 0 else size - 1
    return None


def real_span(start: int, stop: int, size: int | None, mode: PaddingMode) -> tuple[int, int]:
    """A half-open range that holds the real positions that the virtual ones start <= p < stop read.

    It is the smallest, except that one beyond an edge reaches to that edge. For one `start` the end never
    decreases as `stop` grows. With `size` None everything from 0 on counts as real: what the far edge adds
    is known only at the end. Empty ranges come back with equal ends.
    """
    if size is None:
        low, high = max(start, 0), max(stop, 0)
    else:
        low, high = min(max(start, 0), size), min(max(stop, 0), size)
    if mode is PaddingMode.REFLECT:
        if start < 0:
            low, high = 0, max(high, 1 - start if size is None else min(1 - start, size))
        if size is not None and stop > size:
            low, high = max(min(low, 2 * (size - 1) - (stop - 1)), 0), size
    elif mode is PaddingMode.REPLICATE:
        if start < 0:
            low, high = 0, max(high, 1)
        if size is not None and stop > size:
            low, high = min(low, size - 1), size
    return low, high


def first_row_kept(start: int, after: int, seen: int, size: int | None, mode: PaddingMode) -> int:
    """The first real row that windows starting at virtual row `start` or later may still read.

    Args:
        start: the first virtual row that the next neuron looks at.
        after: padding after the last row.
        seen: rows that have arrived.
        size: the height, None while it is not known.
        mode: what the padding reads.
    """
    end = seen if size is None else size
    keep = max(start, 0)
    if mode is PaddingMode.REFLECT and after:
        keep = min(keep, max(end - 1 - after, 0))
    elif mode is PaddingMode.REPLICATE and after:
        keep = min(keep, max(end - 1, 0))
    return keep


def check_padding(before: int, after: int, size: int, mode: PaddingMode, where: str) -> None:
    """Refuses a reflection that is not narrower than its input.

    Raises:
        InvalidRequest: `PADDING_TOO_LARGE`, naming `where` and the numbers.
    """
    if mode is PaddingMode.REFLECT and max(before, after) >= size:
        raise InvalidRequest(
            f"reflect padding must be smaller than the input: {where} has size {size}"
            f" and padding ({before}, {after})",
            reason=Reason.PADDING_TOO_LARGE,
            metadata={"size": str(size), "before": str(before), "after": str(after)},
        )
