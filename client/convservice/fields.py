"""Receptive fields through whole networks: which input values one neuron finally sees.

Given nodes, shapes and a neuron, `network_field` walks back from the node to the input. What is seen of a
feature map is a union of *regions*, each a product of channels and, along every axis, positions; a layer
makes of each region one of its input. Positions are runs of neighbours, so that a field as large as the
image costs no more than a small one. Values play no part: a weight of zero looks as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import AxisWindow, PaddingMode, SampleShape
from convservice.layers import Flatten, Layer, checked_index
from convservice.layers.windows import RowWindow, TransposedWindow
from convservice.nodes import INPUT, Node

Runs = tuple[tuple[int, int], ...]
"""Positions as half-open runs, in ascending order, with gaps between."""


@dataclass(frozen=True)
class Region:
    """All values in some channels at some positions along every axis.

    Attributes:
        channels: the channels.
        axes: per spatial axis the positions.
    """

    channels: Runs
    axes: tuple[Runs, ...]

    @property
    def sides(self) -> tuple[Runs, ...]:
        """Channels and axes alike."""
        return (self.channels, *self.axes)

    def holds(self, other: Region) -> bool:
        """Whether every value of `other` is one of this region."""
        return all(runs_of([*a, *b]) == a for a, b in zip(self.sides, other.sides, strict=True))


@dataclass(frozen=True)
class NetworkField:
    """The input values that a neuron finally sees, through all layers before it.

    Attributes:
        shape: (C, *spatial) of the input.
        regions: their union is what is seen; they may overlap. None where nothing is.
    """

    shape: tuple[int, ...]
    regions: tuple[Region, ...]

    @property
    def channels(self) -> tuple[int, int]:
        """The half-open range from the first channel to the last that is seen; (0, 0) for none."""
        return self._bounds[0]

    @property
    def inside(self) -> tuple[tuple[int, int], ...]:
        """Per spatial axis the half-open range from the first to the last position seen."""
        return self._bounds[1:]

    @property
    def _bounds(self) -> tuple[tuple[int, int], ...]:
        if not self.regions:
            return ((0, 0),) * len(self.shape)
        sides = zip(*(region.sides for region in self.regions), strict=True)
        return tuple((min(runs[0][0] for runs in side), max(runs[-1][1] for runs in side)) for side in sides)

    @property
    def value_count(self) -> int:
        """How many input values are seen."""
        if len(self.regions) == 1:
            return math.prod(sum(stop - start for start, stop in runs) for runs in self.regions[0].sides)
        # Between neighbouring ends of runs nothing changes: one cell stands for all of it.
        ends = [
            sorted({end for region in self.regions for run in region.sides[axis] for end in run})
            for axis in range(len(self.shape))
        ]
        cells = np.zeros([max(len(at) - 1, 0) for at in ends], np.bool_)
        for region in self.regions:
            parts = zip(ends, region.sides, strict=True)
            cells[np.ix_(*(_places(at, runs) for at, runs in parts))] = True
        sizes = [[b - a for a, b in pairwise(at)] for at in ends]
        return sum(
            math.prod(size[i] for size, i in zip(sizes, at, strict=True))
            for at in np.argwhere(cells).tolist()
        )

    def mask(self) -> NDArray[np.bool_]:
        """Which values are seen, an array of the input's shape (C, *spatial)."""
        seen = np.zeros(self.shape, np.bool_)
        for region in self.regions:
            seen[np.ix_(*([at for run in runs for at in range(*run)] for runs in region.sides))] = True
        return seen


def network_field(
    nodes: Sequence[Node],
    shapes: Mapping[str, SampleShape],
    target: str,
    index: int | Sequence[int],
    channel: int | None = None,
) -> NetworkField:
    """What a neuron sees of the network's input.

    Args:
        nodes: the network's, in topological order.
        shapes: of every feature map, by node id, with `"input"`.
        target: the neuron's node.
        index: its spatial position; in a vector its number.
        channel: its channel; None for those of all channels at that position.

    Raises:
        InvalidRequest: there is no such neuron.
    """
    out = shapes[target]
    if out.vector:
        (at,) = checked_index(index, (out.channels,))
        start = Region(((at, at + 1),), ())
    else:
        place = checked_index(index, out.shape[1:])
        if channel is not None and not 0 <= channel < out.channels:
            raise InvalidRequest(
                f"channel must be from 0 to {out.channels - 1}, not {channel}: node {target!r} has"
                f" {out.channels} channels",
                reason=Reason.INVALID_PARAMETER,
                metadata={"channel": str(channel), "channels": str(out.channels)},
                field="channel",
            )
        channels = (0, out.channels) if channel is None else (channel, channel + 1)
        start = Region((channels,), tuple(((i, i + 1),) for i in place))
    wanted: dict[str, list[Region]] = {target: [start]}
    for node in reversed(nodes):
        regions = [
            seen
            for region in wanted.pop(node.id, ())
            for seen in _seen(node.layer, region, shapes[node.inputs[0]])
        ]
        for source in set(node.inputs) if regions else ():
            wanted[source] = _without_held([*wanted.get(source, ()), *regions])
    return NetworkField(shapes[INPUT].shape, tuple(wanted.get(INPUT, ())))


def runs_of(runs: Iterable[tuple[int, int]]) -> Runs:
    """Runs in ascending order, those that meet or overlap as one, empty ones left out."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def _seen(layer: Layer, region: Region, sample: SampleShape) -> Iterator[Region]:
    """The regions of its input that the neurons of a region of the layer's feature map look at."""
    if isinstance(layer, Flatten):
        for first, last in region.channels:
            yield from (Region(sides[0], sides[1:]) for sides in _unflattened(first, last, sample.shape))
        return
    channels = runs_of(  # those of neighbouring channels are the same, or neighbours in the same order
        (layer.seen_channels(first).start, layer.seen_channels(last - 1).stop)
        for first, last in region.channels
    )
    windows = zip(layer.windows(sample), region.axes, sample.shape[1:], strict=True)
    axes = tuple(_positions(window, runs, size, layer.row_mode) for window, runs, size in windows)
    if channels and all(axes):
        yield Region(channels, axes)


def _positions(window: RowWindow, neurons: Runs, size: int, mode: PaddingMode) -> Runs:
    """The real positions along an axis that those neurons look at."""
    virtual = (run for first, last in neurons for run in _virtual(window, first, last))
    return runs_of(real for start, stop in virtual for real in _real(start, stop, size, mode))


def _virtual(window: RowWindow, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The virtual positions that the neurons first <= i < last look at, as runs in any order."""
    if _leave_no_gap(window, last - first):
        yield window.span(first, last)
        return
    for neuron in range(first, last):
        positions = window.positions(neuron)
        if positions and positions.step == 1:
            yield positions[0], positions[-1] + 1
        else:
            yield from ((at, at + 1) for at in positions)


def _leave_no_gap(window: RowWindow, count: int) -> bool:
    """Whether so many neighbouring neurons look at every position from the first to the last; False where
    that is not plain."""
    if isinstance(window, AxisWindow):
        return (window.dilation == 1 and window.kernel >= window.stride) or (
            window.stride == 1 and count >= window.dilation
        )
    if isinstance(window, TransposedWindow):
        return count >= window.dilation
    return True


def _real(start: int, stop: int, size: int, mode: PaddingMode) -> Iterator[tuple[int, int]]:
    """The real positions that the virtual ones start <= p < stop read, as runs, some of them empty."""
    yield max(start, 0), min(stop, size)
    below, beyond = min(stop, 0), max(start, size)
    if mode is PaddingMode.REFLECT:
        yield 1 - below, 1 - start
        yield 2 * (size - 1) - stop + 1, 2 * (size - 1) - beyond + 1
    elif mode is PaddingMode.REPLICATE:
        yield 0, int(start < below)
        yield size - int(beyond < stop), size


def _unflattened(first: int, last: int, shape: tuple[int, ...]) -> Iterator[tuple[Runs, ...]]:
    """The elements first <= i < last of an array in C order, as products of runs along its axes."""
    if len(shape) == 1:
        yield (((first, last),),)
        return
    inner = math.prod(shape[1:])
    top, bottom = -(-first // inner), last // inner
    if top > bottom:  # within one of the outermost places
        parts = [(bottom, first - bottom * inner, last - bottom * inner)]
    else:
        parts = [(top - 1, first - (top - 1) * inner, inner), (bottom, 0, last - bottom * inner)]
        if top < bottom:
            yield ((top, bottom),), *(((0, size),) for size in shape[1:])
    for place, start, stop in parts:
        if start < stop:
            yield from ((((place, place + 1),), *sides) for sides in _unflattened(start, stop, shape[1:]))


def _without_held(regions: Sequence[Region]) -> list[Region]:
    """Regions without those that another one holds."""
    kept: list[Region] = []
    for region in sorted(set(regions), key=_size, reverse=True):
        if not any(other.holds(region) for other in kept):
            kept.append(region)
    return kept


def _size(region: Region) -> int:
    return math.prod(sum(stop - start for start, stop in runs) for runs in region.sides)


def _places(ends: Sequence[int], runs: Runs) -> list[int]:
    """Of the cells between neighbouring ends, those that lie in the runs."""
    return [i for i, end in enumerate(ends[:-1]) if any(start <= end < stop for start, stop in runs)]
