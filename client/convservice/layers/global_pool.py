"""Global pooling: one neuron per channel, which looks at the whole feature map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from convservice.geometry import SampleShape
from convservice.layers.base import Layer, ReceptiveField, split_shape, windowed_field
from convservice.layers.pool import check_spatial
from convservice.layers.windows import WholeWindow


@dataclass(frozen=True)
class GlobalPool(Layer):
    """What both kinds of global pooling share: (C, *spatial) becomes (C, 1, ...), every spatial axis stays.

    The height may be unknown: rows are taken into account as they come.
    """

    canonical_type: ClassVar[str]

    @property
    def rank(self) -> None:
        """None: data of any rank."""
        return None

    @property
    def reducing(self) -> bool:
        """True: a neuron needs every row."""
        return True

    def rows_held(self, sample: SampleShape) -> int:
        """1: each row is taken into account as it comes."""
        return 1

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """(channels, 1, ...)."""
        check_spatial(self.type_name, sample)
        return SampleShape(sample.channels, 1, (1,) * len(sample.rest))

    def window(self, sample: SampleShape) -> WholeWindow:
        """All rows."""
        return WholeWindow(sample.rows)

    def windows(self, sample: SampleShape) -> tuple[WholeWindow, ...]:
        """Every spatial axis whole."""
        return tuple(WholeWindow(size) for size in sample.spatial)

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """Every position of the neuron's own channel; the one index is 0 along every axis."""
        sample = split_shape(input_shape, None)[1]
        return windowed_field(self.windows(sample), index, sample, self.output_sample(sample))

    def canonical(self) -> dict[str, Any]:
        """The type alone."""
        return {"type": self.canonical_type}


class GlobalMaxPool(GlobalPool):
    """The largest value of each channel, NaN where it has one: PyTorch's `AdaptiveMaxPool2d(1)`.

    (N, C, *spatial) becomes (N, C, 1, ...).
    """

    type_name: ClassVar[str] = "GlobalMaxPool"
    canonical_type: ClassVar[str] = "global_max_pool"


class GlobalAvgPool(GlobalPool):
    """The mean of each channel: PyTorch's `AdaptiveAvgPool2d(1)`.

    (N, C, *spatial) becomes (N, C, 1, ...).
    """

    type_name: ClassVar[str] = "GlobalAvgPool"
    canonical_type: ClassVar[str] = "global_avg_pool"
