"""The convolutional layer: local connectivity with shared weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from numpy.typing import ArrayLike, NDArray

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import (
    MAX_RANK,
    AxisWindow,
    PaddingMode,
    Pads,
    Same,
    SampleShape,
    check_padding,
    integer,
    padding_of,
    per_axis,
    same_padding,
)
from convservice.layers.activation import Activation, activation_of
from convservice.layers.base import Layer, ReceptiveField, checked_index, split_shape
from convservice.tensors import Tensor


class Conv(Layer):
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
        self.padding: Same | Pads = padding_of(padding, rank)
        self.groups = integer("groups", groups, 1)
        self.padding_mode = _padding_mode(padding_mode)
        self.activation = activation_of(activation)
        self._check_thresholds()
        self._check_groups()

    def _check_thresholds(self) -> None:
        bias, filters = self.thresholds, self.filters
        if bias is None:
            return
        if bias.shape != (self.out_channels,):
            raise InvalidRequest(
                f"bias must have shape ({self.out_channels},), one threshold a filter, not {bias.shape}",
                reason=Reason.INVALID_SHAPE,
                metadata={"shape": str(bias.shape), "out_channels": str(self.out_channels)},
                field="bias",
            )
        if bias.dtype != filters.dtype:
            raise InvalidRequest(
                f"bias must have the weight's dtype {filters.dtype}, not {bias.dtype}; convert it first, for"
                f" example bias.astype('{filters.dtype}')",
                reason=Reason.DATA_TYPE_MISMATCH,
                metadata={"bias": bias.dtype.name, "weight": filters.dtype.name},
                field="bias",
            )

    def _check_groups(self) -> None:
        if self.out_channels % self.groups:
            raise InvalidRequest(
                f"out_channels must be divisible by groups: weight has {self.out_channels} filters,"
                f" groups is {self.groups}",
                reason=Reason.CHANNEL_MISMATCH,
                metadata={"out_channels": str(self.out_channels), "groups": str(self.groups)},
                field="groups",
            )

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
    def out_channels(self) -> int:
        """Number of filters."""
        return self.filters.shape[0]

    @property
    def in_channels(self) -> int:
        """Channels of the input over all groups."""
        return self.filters.shape[1] * self.groups

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The filter bank, and the thresholds where there are any."""
        return (self.filters,) if self.thresholds is None else (self.filters, self.thresholds)

    @property
    def row_mode(self) -> PaddingMode:
        """What the padding reads."""
        return self.padding_mode

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

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """(out_channels, *output sizes); see `AxisWindow.output_size`."""
        self._check_sample(sample)
        sizes: list[int | None] = []
        for axis, (window, size) in enumerate(zip(self.windows(sample), sample.spatial, strict=True)):
            if size is None:
                sizes.append(None)
                continue
            where = f"spatial axis {axis}"
            out = window.output_size(size)
            if out < 1:
                padded = size + window.before + window.after
                raise InvalidRequest(
                    f"the output would be empty: {where} has size {size}, {padded} with padding, and the"
                    f" filter spans {window.extent} (kernel {window.kernel}, dilation {window.dilation})",
                    reason=Reason.OUTPUT_EMPTY,
                    metadata={"axis": str(axis), "size": str(padded), "extent": str(window.extent)},
                    field="sample_shape",
                )
            check_padding(window.before, window.after, size, self.padding_mode, where)
            sizes.append(out)
        return SampleShape(self.out_channels, sizes[0], tuple(size for size in sizes[1:] if size is not None))

    def _check_sample(self, sample: SampleShape) -> None:
        if sample.rank != self.rank:
            raise InvalidRequest(
                f"the filter bank has {self.rank} spatial axes, the input has {sample.rank}: {sample}",
                reason=Reason.INVALID_SHAPE,
                metadata={"rank": str(self.rank), "shape": str(sample)},
                field="sample_shape",
            )
        if sample.channels != self.in_channels:
            raise InvalidRequest(
                f"weight has {self.filters.shape[1]} input channels per group, the input has"
                f" {sample.channels} channels in {self.groups} group{'s' if self.groups > 1 else ''}",
                reason=Reason.CHANNEL_MISMATCH,
                metadata={
                    "channels": str(sample.channels),
                    "expected": str(self.in_channels),
                    "groups": str(self.groups),
                },
                field="sample_shape",
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
        at = checked_index(index, (out.height, *out.rest))
        axes = tuple(window.positions(i) for window, i in zip(self.windows(sample), at, strict=True))
        return ReceptiveField(axes, (sample.height, *sample.rest), self.padding_mode)

    def canonical(self) -> dict[str, Any]:
        """The contract's canonical form, with the digests of the weights."""
        padding = self.padding if self.padding == "same" else [list(pair) for pair in self.padding]
        return {
            "type": "conv",
            "weight": self.filters.digest.hex(),
            "bias": None if self.thresholds is None else self.thresholds.digest.hex(),
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
