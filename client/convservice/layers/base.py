"""What every layer is: a declaration with its geometry.

A layer is given the shape of its input and hands back what follows from it without any arithmetic on
values: output shape, neuron and parameter counts, receptive fields, and the rows of input that rows of
output need. The values themselves are computed by a backend. Layers are immutable.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, MAX_SIZE, AxisWindow, PaddingMode, SampleShape, real_span
from convservice.layers.windows import RowWindow, rows_held
from convservice.parameters import integer, per_axis
from convservice.tensors import Tensor


@dataclass(frozen=True)
class ReceptiveField:
    """The input positions that one neuron looks at.

    Attributes:
        axes: per spatial axis the virtual positions, one per weight; those below 0 or at the input's size
            and beyond lie in the padding. A transposed convolution's may be empty.
        sizes: the input's spatial sizes; none where the input is a vector.
        mode: what positions in the padding read.
        channels: the input channels looked at, where a layer takes single ones; None for all of the neuron's
            group.
    """

    axes: tuple[range, ...]
    sizes: tuple[int, ...]
    mode: PaddingMode
    channels: range | None = None

    @property
    def inside(self) -> tuple[tuple[int, int], ...]:
        """Per axis the half-open range of real positions from the first to the last looked at."""
        spans = zip(self.axes, self.sizes, strict=True)
        return tuple(
            real_span(axis[0], axis[-1] + 1, size, self.mode) if axis else (0, 0) for axis, size in spans
        )


class Layer(ABC):
    """A declared operation.

    A *windowed* layer needs a few rows of its input for a row of output; a *reducing* one needs them all.
    """

    type_name: ClassVar[str]

    fewest_inputs: ClassVar[int] = 1
    """Feature maps that it takes at least."""

    most_inputs: ClassVar[int | None] = 1
    """Feature maps that it takes at most; None for no limit."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """Number of spatial axes of its data, 0 for vectors; None where any will do."""

    @property
    def reducing(self) -> bool:
        """Whether a neuron needs every row of the input."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its weight tensors."""
        return ()

    @property
    def parameter_count(self) -> int:
        """Number of weights and thresholds, each counted once however many neurons share it."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @abstractmethod
    def output_sample(self, sample: SampleShape) -> SampleShape:
        """The shape of a sample's feature maps; rows None when the input's are.

        Raises:
            InvalidRequest: the sample does not fit the layer, or the output would be empty.
        """

    def joined_sample(self, samples: Sequence[SampleShape]) -> SampleShape:
        """The shape of a sample's feature maps where the layer is given one sample per input.

        Raises:
            InvalidRequest: likewise, or the samples do not fit one another.
        """
        return self.output_sample(samples[0])

    @abstractmethod
    def window(self, sample: SampleShape) -> RowWindow:
        """How its neurons look at rows: the window along the first spatial axis."""

    def windows(self, sample: SampleShape) -> Sequence[RowWindow]:
        """The window along every spatial axis: one position for one where a class says nothing else."""
        return (AxisWindow(kernel=1),) * sample.rank

    def seen_channels(self, channel: int) -> range:
        """The input channels that the neurons of channel `channel` look at: that one where a class says
        nothing else."""
        return range(channel, channel + 1)

    @property
    def row_mode(self) -> PaddingMode:
        """What the row padding reads."""
        return PaddingMode.ZEROS

    @abstractmethod
    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The input positions that the neuron at spatial position `index` looks at."""

    @abstractmethod
    def canonical(self) -> dict[str, Any]:
        """The layer in the contract's canonical form: JSON values only."""

    def input_rows(self, first: int, last: int, sample: SampleShape) -> tuple[int, int]:
        """The half-open range of virtual input rows that output rows first <= i < last look at.

        Both ends never decrease. Rows below 0 or at the height and beyond lie in the padding. The height
        may be unknown (`sample.rows` None).
        """
        return self.window(sample).span(first, last)

    def real_rows(self, first: int, last: int, sample: SampleShape) -> tuple[int, int]:
        """The real input rows that those output rows read: what must have arrived, and be held."""
        start, stop = self.input_rows(first, last, sample)
        return real_span(start, stop, sample.rows, self.row_mode)

    def rows_held(self, sample: SampleShape) -> int:
        """Most input rows that it holds between two of its output rows, whatever the height."""
        return rows_held(self.window(sample), sample.rows, self.row_mode)

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the feature map for an input (N, C, *spatial) or (C, *spatial)."""
        batch, sample = split_shape(input_shape, self.rank)
        return (*batch, *self.output_sample(sample).shape)

    def neuron_count(self, input_shape: Sequence[int]) -> int:
        """Number of neurons for one sample: output channels times output positions."""
        return self.output_sample(split_shape(input_shape, self.rank)[1]).elements

    @property
    def filter_size(self) -> int:
        """Weights that one neuron has, its threshold apart; 0 for a layer without weights."""
        return 0

    def unshared_parameter_count(self, input_shape: Sequence[int]) -> int:
        """Weights and thresholds that there would be if no two neurons shared any.

        For `Conv` that is `parameter_count` of the `LocallyConnected` of the same geometry, one with a
        threshold of its own at every position where the `Conv` has thresholds.
        """
        return self.neuron_count(input_shape) * (self.filter_size + (len(self.tensors) > 1))

    def connection_count(self, input_shape: Sequence[int]) -> int:
        """Connections for one sample: pairs of a neuron and an input value that it looks at.

        A value counts once for each weight, or place of a window, that lies on it. What lies in the padding
        is no connection, whatever the padding reads there, nor is a threshold. A layer with several inputs
        has so many to each of them.
        """
        sample = split_shape(input_shape, self.rank)[1]
        out = self.output_sample(sample)
        windows = zip(self.windows(sample), sample.shape[1:], strict=True)
        along = math.prod(window.connections(size) for window, size in windows)
        return out.channels * len(self.seen_channels(0)) * along


def split_shape(shape: Sequence[int], rank: int | None) -> tuple[tuple[int, ...], SampleShape]:
    """A user's shape (N, C, *spatial) or (C, *spatial) as its batch part, () or (N,), and its sample.

    With `rank` 0 it is that of vectors, (N, F) or (F,). With `rank` None a shape of two sizes or more is
    taken as (N, C, *spatial).

    Raises:
        InvalidRequest: `INVALID_SHAPE` for a wrong number of axes, a size that is not an integer, or a
            channel or spatial size below 1.
    """
    sizes = [integer("shape", size, 0) for size in shape]
    given, rank = rank, len(sizes) - 2 if rank is None else rank
    if not 0 <= rank <= MAX_RANK or len(sizes) not in (rank + 1, rank + 2):
        axes = f"0 to {MAX_RANK}" if given is None else str(rank)
        raise InvalidRequest(
            f"the input has {len(sizes)} axes, {tuple(sizes)}; it must be (N, C, *spatial) or (C, *spatial)"
            f" with {axes} spatial axes",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(tuple(sizes)), "rank": str(rank)},
            field="shape",
        )
    cut = len(sizes) - rank - 1
    batch, (channels, *spatial) = tuple(sizes[:cut]), sizes[cut:]
    if min(channels, *spatial, 1) < 1:
        raise InvalidRequest(
            f"channels and spatial sizes must be at least 1, the input has {tuple(sizes)}",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(tuple(sizes))},
            field="shape",
        )
    if not spatial:
        return batch, SampleShape.of_vector(channels)
    return batch, SampleShape(channels, spatial[0], tuple(spatial[1:]))


def checked_index(index: int | Sequence[int], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """A neuron's position as a tuple, each within its size.

    Raises:
        InvalidRequest: `INVALID_PARAMETER` for a wrong number of positions or one outside.
    """
    given = per_axis("index", index if hasattr(index, "__len__") else (index,), len(sizes), -MAX_SIZE)
    if not all(0 <= at < size for at, size in zip(given, sizes, strict=True)):
        raise InvalidRequest(
            f"neuron {given} is outside the feature map of size {sizes}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"index": str(given), "sizes": str(sizes)},
            field="index",
        )
    return given


def windowed_field(
    windows: Sequence[RowWindow],
    index: int | Sequence[int],
    sample: SampleShape,
    out: SampleShape,
    mode: PaddingMode = PaddingMode.ZEROS,
) -> ReceptiveField:
    """The receptive field of a neuron that looks through `windows`, one per spatial axis.

    Args:
        windows: along each spatial axis.
        index: the neuron's position in the feature map.
        sample: the input.
        out: the feature map.
        mode: what the padding reads.
    """
    at = checked_index(index, out.shape[1:])
    axes = tuple(window.positions(i) for window, i in zip(windows, at, strict=True))
    return ReceptiveField(axes, sample.shape[1:], mode)


def elementwise_field(index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
    """The receptive field of a neuron that looks at its own place alone; in a vector, at its own number."""
    sample = split_shape(input_shape, None)[1]
    if sample.vector:
        (at,) = checked_index(index, (sample.channels,))
        return ReceptiveField((), (), PaddingMode.ZEROS, range(at, at + 1))
    window = AxisWindow(kernel=1)
    return windowed_field((window,) * sample.rank, index, sample, sample)
