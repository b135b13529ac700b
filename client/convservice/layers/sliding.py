"""Layers whose neurons slide a window over the input, each with weights on what the window shows.

Given a window's numbers per axis, and filters, `Sliding` hands on where the windows lie, and which channels
and tensors there are. Whether neurons share a filter, and so what the filters' axes mean, each layer says.
"""

from __future__ import annotations

from abc import abstractmethod

from convservice.geometry import AxisWindow, Pads, Same, SampleShape, same_padding
from convservice.layers.base import Layer
from convservice.layers.weights import group_channels
from convservice.tensors import Tensor


class Sliding(Layer):
    """A window per axis, channel groups, filters and thresholds."""

    filters: Tensor
    thresholds: Tensor | None
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Same | Pads
    groups: int

    @property
    @abstractmethod
    def kernel(self) -> tuple[int, ...]:
        """Weights along each spatial axis."""

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Channels of the input over all groups."""

    @property
    def out_channels(self) -> int:
        """Channels of the feature map."""
        return self.filters.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The filters, and the thresholds where there are any."""
        return (self.filters,) if self.thresholds is None else (self.filters, self.thresholds)

    def _axis(self, axis: int, size: int | None) -> AxisWindow:
        kernel, stride, dilation = self.kernel[axis], self.stride[axis], self.dilation[axis]
        if self.padding == "same":
            before, after = same_padding(size, kernel, stride, dilation)
        else:
            before, after = self.padding[axis]
        return AxisWindow(kernel, stride, dilation, before, after)

    def window(self, sample: SampleShape) -> AxisWindow:
        """The window along the first spatial axis."""
        return self._axis(0, sample.rows)

    def windows(self, sample: SampleShape) -> tuple[AxisWindow, ...]:
        """The window along every spatial axis, `same` resolved for this sample."""
        return tuple(self._axis(axis, size) for axis, size in enumerate(sample.spatial))

    def seen_channels(self, channel: int) -> range:
        """Those of the channel's group."""
        return group_channels(channel, self.out_channels, self.in_channels, self.groups)
