"""The transposed convolution: every input position spreads its value over a window of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from numpy.typing import ArrayLike, NDArray

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, Pads, SampleShape
from convservice.layers.activation import Activation, activation_of
from convservice.layers.base import Layer, ReceptiveField, split_shape, windowed_field
from convservice.layers.weights import (
    check_channels,
    check_groups,
    check_rank,
    check_thresholds,
    digest_of,
    group_channels,
)
from convservice.layers.windows import TransposedWindow, output_sizes, sample_of
from convservice.parameters import integer, padding_of, per_axis
from convservice.tensors import Tensor


class ConvTranspose(Layer):
    """A transposed convolution: PyTorch's `conv_transpose1d` to `conv_transpose3d`.

    y[o, j] = bias[o] + sum over c, p, k of weight[c, o, k] * x[c, p], where p*stride - padding + k*dilation
    is j, then the activation.

    Args:
        weight: the filter bank, shape (in_channels, out_channels / groups, *kernel), 1-D to 3-D; copied.
        bias: the thresholds, shape (out_channels,), of the weight's dtype; copied.
        stride: step between the neurons that neighbouring positions contribute to, one integer or one per
            axis.
        padding: neurons left out at each end: an integer, one per axis, or a (before, after) pair per axis.
        output_padding: neurons added at the end, one integer or one per axis, each smaller than the axis'
            stride or dilation.
        dilation: step between neighbouring weights, one integer or one per axis.
        groups: channel groups that do not see one another; divides both channel numbers.
        activation: a function's name or an `Activation`.

    Raises:
        InvalidRequest: a shape, dtype or number breaks a rule; the message states it.
    """

    type_name: ClassVar[str] = "ConvTranspose"

    def __init__(
        self,
        weight: ArrayLike | Tensor,
        bias: ArrayLike | Tensor | None = None,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[Sequence[int]] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        activation: str | Activation | None = None,
    ) -> None:
        self.filters = Tensor.of(weight, "weight")
        shape = self.filters.shape
        if not 3 <= len(shape) <= 2 + MAX_RANK:
            raise InvalidRequest(
                f"weight must have shape (in_channels, out_channels / groups, *kernel) with 1 to {MAX_RANK}"
                f" kernel axes, not {shape}",
                reason=Reason.INVALID_SHAPE,
                metadata={"shape": str(shape)},
                field="weight",
            )
        self.thresholds = None if bias is None else Tensor.of(bias, "bias")
        self.stride = per_axis("stride", stride, self.rank, 1)
        self.dilation = per_axis("dilation", dilation, self.rank, 1)
        self.padding = _padding(padding, self.rank)
        self.output_padding = per_axis("output_padding", output_padding, self.rank, 0)
        self.groups = integer("groups", groups, 1)
        self.activation = activation_of(activation)
        check_thresholds(self.thresholds, self.filters, [(self.out_channels,)])
        check_groups("in_channels", self.in_channels, self.groups)
        self._check_output_padding()

    def _check_output_padding(self) -> None:
        rules = zip(self.output_padding, self.stride, self.dilation, strict=True)
        for axis, (added, stride, dilation) in enumerate(rules):
            if added >= max(stride, dilation):
                raise InvalidRequest(
                    "output_padding must be smaller than stride or dilation: along spatial axis"
                    f" {axis} it is {added}, stride {stride}, dilation {dilation}",
                    reason=Reason.INVALID_PARAMETER,
                    metadata={"name": "output_padding", "value": str(added), "axis": str(axis)},
                    field="output_padding",
                )

    @property
    def weight(self) -> NDArray[Any]:
        """The filter bank, read-only, shape (in_channels, out_channels / groups, *kernel)."""
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
    def out_channels(self) -> int:
        """Channels of the feature map over all groups."""
        return self.filters.shape[1] * self.groups

    @property
    def in_channels(self) -> int:
        """Channels of the input over all groups."""
        return self.filters.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The filter bank, and the thresholds where there are any."""
        return (self.filters,) if self.thresholds is None else (self.filters, self.thresholds)

    def window(self, sample: SampleShape) -> TransposedWindow:
        """The window along the first spatial axis."""
        return self.windows(sample)[0]

    def windows(self, sample: SampleShape) -> tuple[TransposedWindow, ...]:
        """The window along every spatial axis."""
        return tuple(
            TransposedWindow(kernel, stride, dilation, before, after, added)
            for kernel, stride, dilation, (before, after), added in zip(
                self.kernel, self.stride, self.dilation, self.padding, self.output_padding, strict=True
            )
        )

    def seen_channels(self, channel: int) -> range:
        """Those of the channel's group."""
        return group_channels(channel, self.out_channels, self.in_channels, self.groups)

    def unshared_parameter_count(self, input_shape: Sequence[int]) -> int:
        """Weights and thresholds if every input position had filters of its own, and every neuron a
        threshold where the layer has them."""
        sample = split_shape(input_shape, self.rank)[1]
        own = sample.elements * math.prod(self.filters.shape[1:])
        return own if self.thresholds is None else own + self.neuron_count(input_shape)

    def real_rows(self, first: int, last: int, sample: SampleShape) -> tuple[int, int]:
        """The real input rows that those output rows read; where the height is not known, also those without
        which the output would end before them."""
        start, stop = super().real_rows(first, last, sample)
        return start, stop if sample.rows is not None else max(stop, self.window(sample).input_size(last))

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """(out_channels, *output sizes); see `TransposedWindow.output_size`."""
        check_rank("the filter bank", self.rank, sample)
        check_channels(sample, self.in_channels // self.groups, self.groups)
        return sample_of(self.out_channels, output_sizes(self.windows(sample), sample, "the filter"))

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The input positions that contribute to the neuron at spatial position `index`, in every channel; in
        ascending order, so that the weights that they meet come in descending order."""
        sample = split_shape(input_shape, self.rank)[1]
        return windowed_field(self.windows(sample), index, sample, self.output_sample(sample))

    def canonical(self) -> dict[str, Any]:
        """The contract's canonical form, with the digests of the weights."""
        return {
            "type": "conv_transpose",
            "weight": digest_of(self.filters),
            "bias": digest_of(self.thresholds),
            "stride": list(self.stride),
            "dilation": list(self.dilation),
            "padding": [list(pair) for pair in self.padding],
            "output_padding": list(self.output_padding),
            "groups": self.groups,
            "activation": self.activation.canonical_function(),
        }

    def __repr__(self) -> str:
        return (
            f"ConvTranspose(weight {self.filters.shape} {self.filters.dtype},"
            f" bias={self.thresholds is not None}, stride={self.stride}, padding={self.padding},"
            f" output_padding={self.output_padding}, dilation={self.dilation}, groups={self.groups},"
            f" activation={self.activation.function!r})"
        )


def _padding(value: Any, rank: int) -> Pads:
    pads = padding_of(value, rank)
    if pads == "same":
        raise InvalidRequest(
            "padding of ConvTranspose must be given in numbers or be 'valid': 'same' says nothing of the size"
            " of its output",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": "padding", "value": "'same'"},
            field="padding",
        )
    return pads
