"""Local connectivity without shared weights: every output position has filters of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from numpy.typing import ArrayLike, NDArray

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, SampleShape
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


class LocallyConnected(Sliding):
    """A locally connected layer: a `Conv` whose filters differ from position to position.

    y[o, i] = bias[o] + sum over c, k of weight[o, c, i, k] * x[c, i*stride + k*dilation - padding], then the
    activation. Its weights fix the size of its feature map, so it takes inputs of one size alone.

    Args:
        weight: the filters, shape (out_channels, in_channels / groups, *output_spatial, *kernel), 1-D to 3-D;
            copied.
        bias: the thresholds, of the weight's dtype, shape (out_channels,), or (out_channels,
            *output_spatial) for one at every position; copied.
        stride: step between neighbouring neurons, one integer or one per axis.
        padding: an integer, one per axis, a (before, after) pair per axis, "same" or "valid"; reads 0.
        dilation: step between neighbouring weights, one integer or one per axis.
        groups: channel groups that do not see one another; divides both channel numbers.
        activation: a function's name or an `Activation`.

    Raises:
        InvalidRequest: a shape, dtype or number breaks a rule; the message states it.
    """

    type_name: ClassVar[str] = "LocallyConnected"

    def __init__(
        self,
        weight: ArrayLike | Tensor,
        bias: ArrayLike | Tensor | None = None,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[Sequence[int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        activation: str | Activation | None = None,
    ) -> None:
        self.filters = Tensor.of(weight, "weight")
        shape = self.filters.shape
        if len(shape) not in range(4, 3 + 2 * MAX_RANK, 2):
            raise InvalidRequest(
                "weight must have shape (out_channels, in_channels / groups, *output_spatial, *kernel) with"
                f" as many output as kernel axes, 1 to {MAX_RANK}, not {shape}",
                reason=Reason.INVALID_SHAPE,
                metadata={"shape": str(shape)},
                field="weight",
            )
        self.thresholds = None if bias is None else Tensor.of(bias, "bias")
        self.stride = per_axis("stride", stride, self.rank, 1)
        self.dilation = per_axis("dilation", dilation, self.rank, 1)
        self.padding = padding_of(padding, self.rank)
        self.groups = integer("groups", groups, 1)
        self.activation = activation_of(activation)
        shapes = [(self.out_channels,), (self.out_channels, *self.output_spatial)]
        check_thresholds(self.thresholds, self.filters, shapes)
        check_groups("out_channels", self.out_channels, self.groups)

    @property
    def weight(self) -> NDArray[Any]:
        """The filters, read-only, shape (out_channels, in_channels / groups, *output_spatial, *kernel)."""
        return self.filters.array

    @property
    def bias(self) -> NDArray[Any] | None:
        """The thresholds, read-only, shape (out_channels,) or (out_channels, *output_spatial); or None."""
        return None if self.thresholds is None else self.thresholds.array

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return (len(self.filters.shape) - 2) // 2

    @property
    def output_spatial(self) -> tuple[int, ...]:
        """Spatial sizes of the feature map."""
        return self.filters.shape[2 : 2 + self.rank]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Weights along each spatial axis."""
        return self.filters.shape[2 + self.rank :]

    @property
    def in_channels(self) -> int:
        """Channels of the input over all groups."""
        return self.filters.shape[1] * self.groups

    @property
    def filter_size(self) -> int:
        """in_channels / groups weights at every position of the kernel."""
        return self.filters.shape[1] * math.prod(self.kernel)

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """(out_channels, *output_spatial), for the one input size that gives just that.

        Raises:
            InvalidRequest: `HEIGHT_REQUIRED` where the height is not known; `INVALID_SHAPE` where the input
                would give a feature map of another size.
        """
        check_rank("the filters", self.rank, sample)
        check_channels(sample, self.filters.shape[1], self.groups)
        if sample.rows is None:
            raise InvalidRequest(
                f"LocallyConnected has filters for {self.output_spatial[0]} output rows and needs the height,"
                " which is not known",
                reason=Reason.HEIGHT_REQUIRED,
                metadata={"output_spatial": str(self.output_spatial)},
                field="sample_shape",
            )
        sizes = output_sizes(self.windows(sample), sample, "the filter")
        if sizes != self.output_spatial:
            raise InvalidRequest(
                f"weight has filters for an output of size {self.output_spatial}, this input, {sample}, would"
                f" give {sizes}",
                reason=Reason.INVALID_SHAPE,
                metadata={
                    "output_spatial": str(self.output_spatial),
                    "given": str(sizes),
                    "shape": str(sample),
                },
                field="sample_shape",
            )
        return sample_of(self.out_channels, sizes)

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The input positions that the neuron at spatial position `index` looks at, in every channel."""
        sample = split_shape(input_shape, self.rank)[1]
        return windowed_field(self.windows(sample), index, sample, self.output_sample(sample))

    def canonical(self) -> dict[str, Any]:
        """The contract's canonical form, with the digests of the weights."""
        padding = self.padding if self.padding == "same" else [list(pair) for pair in self.padding]
        return {
            "type": "locally_connected",
            "weight": digest_of(self.filters),
            "bias": digest_of(self.thresholds),
            "stride": list(self.stride),
            "dilation": list(self.dilation),
            "padding": padding,
            "groups": self.groups,
            "activation": self.activation.canonical_function(),
        }

    def __repr__(self) -> str:
        return (
            f"LocallyConnected(weight {self.filters.shape} {self.filters.dtype},"
            f" bias={self.thresholds is not None}, stride={self.stride}, padding={self.padding!r},"
            f" dilation={self.dilation}, groups={self.groups}, activation={self.activation.function!r})"
        )
