"""The convolutional layer: local connectivity with shared weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from numpy.typing import ArrayLike, NDArray

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, PaddingMode, SampleShape
from convservice.layers.activation import Activation, activation_of
from convservice.layers.base import ReceptiveField, split_shape, windowed_field
from convservice.layers.sliding import Sliding
from convservice.layers.weights import (
    check_channels,
    check_groups,
    check_rank,
    check_thresholds,
    digest_of,
)
from convservice.layers.windows import output_sizes, sample_of
from convservice.parameters import integer, padding_of, per_axis
from convservice.tensors import Tensor


class Conv(Sliding):
    """A convolutional layer: every neuron of a channel uses the same filter, each at its own position.

    y[o, i] = bias[o] + sum over c, k of weight[o, c, k] * x[c, i*stride + k*dilation - padding]
    (cross-correlation: the filter is not flipped), then the activation.

    Args:
        weight: the filter bank, shape (out_channels, in_channels / groups, *kernel), 1-D to 3-D; copied.
        bias: the thresholds, shape (out_channels,), of the weight's dtype; copied.
        stride: step between neighbouring neurons, one integer or one per axis.
        padding: an integer, one per axis, a (before, after) pair per axis, "same" or "valid".
        dilation: step between neighbouring weights, one integer or one per axis.
        groups: channel groups that do not see one another; divides both channel numbers.
        padding_mode: "zeros", "reflect" or "replicate".
        activation: a function's name or an `Activation`.

    Raises:
        InvalidRequest: a shape, dtype or number breaks a rule; the message states it.
    """

    type_name: ClassVar[str] = "Conv"

    def __init__(
        self,
        weight: ArrayLike | Tensor,
        bias: ArrayLike | Tensor | None = None,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[Sequence[int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        activation: str | Activation | None = None,
    ) -> None:
        self.filters = Tensor.of(weight, "weight")
        shape = self.filters.shape
        if not 3 <= len(shape) <= 2 + MAX_RANK:
            raise InvalidRequest(
                f"weight must have shape (out_channels, in_channels / groups, *kernel) with 1 to {MAX_RANK}"
                f" kernel axes, not {shape}",
                reason=Reason.INVALID_SHAPE,
                metadata={"shape": str(shape)},
                field="weight",
            )
        self.thresholds = None if bias is None else Tensor.of(bias, "bias")
        rank = len(shape) - 2
        self.stride = per_axis("stride", stride, rank, 1)
        self.dilation = per_axis("dilation", dilation, rank, 1)
        self.padding = padding_of(padding, rank)
        self.groups = integer("groups", groups, 1)
        self.padding_mode = _padding_mode(padding_mode)
        self.activation = activation_of(activation)
        check_thresholds(self.thresholds, self.filters, [(self.out_channels,)])
        check_groups("out_channels", self.out_channels, self.groups)

    @property
    def weight(self) -> NDArray[Any]:
        """The filter bank, read-only, shape (out_channels, in_channels / groups, *kernel)."""
        return self.filters.array

    @property
    def bias(self) -> NDArray[Any] | None:
        """The thresholds, read-only, shape (out_channels,); None where there are none."""
        return None if self.thresholds is None else self.thresholds.array

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.filters.shape) - 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """Weights along each spatial axis."""
        return self.filters.shape[2:]

    @property
    def in_channels(self) -> int:
        """Channels of the input over all groups."""
        return self.filters.shape[1] * self.groups

    @property
    def row_mode(self) -> PaddingMode:
        """What the padding reads."""
        return self.padding_mode

    @property
    def filter_size(self) -> int:
        """in_channels / groups weights at every position of the kernel."""
        return math.prod(self.filters.shape[1:])

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """(out_channels, *output sizes); see `AxisWindow.output_size`."""
        check_rank("the filter bank", self.rank, sample)
        check_channels(sample, self.filters.shape[1], self.groups)
        return sample_of(
            self.out_channels, output_sizes(self.windows(sample), sample, "the filter", self.padding_mode)
        )

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The input positions that the neuron at spatial position `index` looks at, in every channel.

        Args:
            index: the neuron's position in the feature map, one integer per spatial axis.
            input_shape: (N, C, *spatial), (C, *spatial).

        Raises:
            InvalidRequest: the index lies outside the feature map, or the shape does not fit.
        """
        sample = split_shape(input_shape, self.rank)[1]
        out = self.output_sample(sample)
        return windowed_field(self.windows(sample), index, sample, out, self.padding_mode)

    def canonical(self) -> dict[str, Any]:
        """The contract's canonical form, with the digests of the weights."""
        padding = self.padding if self.padding == "same" else [list(pair) for pair in self.padding]
        return {
            "type": "conv",
            "weight": digest_of(self.filters),
            "bias": digest_of(self.thresholds),
            "stride": list(self.stride),
            "dilation": list(self.dilation),
            "padding": padding,
            "groups": self.groups,
            "padding_mode": self.padding_mode.value,
            "activation": self.activation.canonical_function(),
        }

    def __repr__(self) -> str:
        return (
            f"Conv(weight {self.filters.shape} {self.filters.dtype}, bias={self.thresholds is not None},"
            f" stride={self.stride}, padding={self.padding!r}, dilation={self.dilation},"
            f" groups={self.groups}, padding_mode={self.padding_mode.value!r},"
            f" activation={self.activation.function!r})"
        )


def _padding_mode(value: str) -> PaddingMode:
    try:
        return PaddingMode(value)
    except ValueError:
        raise InvalidRequest(
            f"padding_mode must be one of {', '.join(PaddingMode)}, not {value!r}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": "padding_mode", "value": repr(value)},
            field="padding_mode",
        ) from None
