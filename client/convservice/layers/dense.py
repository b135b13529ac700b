"""Full connectivity: feature maps laid out as a vector, and neurons that look at all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import AxisWindow, PaddingMode, SampleShape
from convservice.layers.activation import Activation, activation_of
from convservice.layers.base import Layer, ReceptiveField, checked_index, split_shape
from convservice.layers.weights import check_thresholds, digest_of
from convservice.layers.windows import WholeWindow, checked_size
from convservice.tensors import Tensor


@dataclass(frozen=True)
class Flatten(Layer):
    """Feature maps as a vector: (C, *spatial) becomes (C * prod(spatial),), in C order, channels first.

    Its height must be known. A vector stays what it is.
    """

    type_name: ClassVar[str] = "Flatten"

    @property
    def rank(self) -> None:
        """None: data of any rank."""
        return None

    @property
    def reducing(self) -> bool:
        """True: the vector is there when the last row is."""
        return True

    def rows_held(self, sample: SampleShape) -> int:
        """All of them."""
        return sample.height

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """A vector of as many features as the sample has elements.

        Raises:
            InvalidRequest: `HEIGHT_REQUIRED` where the height is not known; `SIZE_OVERFLOW` for a vector of
                more than `MAX_SIZE` features.
        """
        if sample.rows is None:
            raise InvalidRequest(
                "Flatten needs the height, which is not known",
                reason=Reason.HEIGHT_REQUIRED,
                metadata={"shape": str(sample)},
                field="sample_shape",
            )
        return SampleShape.of_vector(checked_size(sample.elements, "vector"))

    def window(self, sample: SampleShape) -> WholeWindow:
        """All rows."""
        return WholeWindow(sample.rows)

    def connection_count(self, input_shape: Sequence[int]) -> int:
        """One for each element: it passes on one value."""
        return self.neuron_count(input_shape)

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The one position that the vector's element `index` comes from, with its channel."""
        sample = split_shape(input_shape, None)[1]
        (at,) = checked_index(index, (self.output_sample(sample).channels,))
        channel, *position = (int(i) for i in np.unravel_index(at, sample.shape))
        axes = tuple(range(i, i + 1) for i in position)
        return ReceptiveField(axes, sample.shape[1:], PaddingMode.ZEROS, range(channel, channel + 1))

    def canonical(self) -> dict[str, Any]:
        """`{"type": "flatten"}`."""
        return {"type": "flatten"}


class Linear(Layer):
    """A fully connected layer on vectors: y = weight x + bias, then the activation.

    It takes the vectors (N, in_features) that `Flatten` gives, or that the network itself is given, and gives
    (N, out_features).

    Args:
        weight: shape (out_features, in_features); copied.
        bias: the thresholds, shape (out_features,), of the weight's dtype; copied.
        activation: a function's name or an `Activation`.

    Raises:
        InvalidRequest: a shape, dtype or number breaks a rule; the message states it.
    """

    type_name: ClassVar[str] = "Linear"

    def __init__(
        self,
        weight: ArrayLike | Tensor,
        bias: ArrayLike | Tensor | None = None,
        *,
        activation: str | Activation | None = None,
    ) -> None:
        self.filters = Tensor.of(weight, "weight")
        if len(self.filters.shape) != 2:
            raise InvalidRequest(
                f"weight must have shape (out_features, in_features), not {self.filters.shape}",
                reason=Reason.INVALID_SHAPE,
                metadata={"shape": str(self.filters.shape)},
                field="weight",
            )
        self.thresholds = None if bias is None else Tensor.of(bias, "bias")
        self.activation = activation_of(activation)
        check_thresholds(self.thresholds, self.filters, [(self.out_features,)])

    @property
    def weight(self) -> NDArray[Any]:
        """The weights, read-only, shape (out_features, in_features)."""
        return self.filters.array

    @property
    def bias(self) -> NDArray[Any] | None:
        """The thresholds, read-only, shape (out_features,); None where there are none."""
        return None if self.thresholds is None else self.thresholds.array

    @property
    def out_features(self) -> int:
        """Neurons."""
        return self.filters.shape[0]

    @property
    def in_features(self) -> int:
        """Elements of the vectors it takes."""
        return self.filters.shape[1]

    @property
    def rank(self) -> int:
        """0: vectors."""
        return 0

    @property
    def reducing(self) -> bool:
        """True: every neuron looks at everything."""
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights, and the thresholds where there are any."""
        return (self.filters,) if self.thresholds is None else (self.filters, self.thresholds)

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """A vector of out_features.

        Raises:
            InvalidRequest: `INVALID_SHAPE` for an input that is no vector, `CHANNEL_MISMATCH` for one of
                another size.
        """
        if not sample.vector:
            raise InvalidRequest(
                f"Linear takes vectors, the input has {sample.rank} spatial axes, {sample}: put a Flatten()"
                " before it",
                reason=Reason.INVALID_SHAPE,
                metadata={"shape": str(sample), "expected": str(self.in_features)},
                field="sample_shape",
            )
        if sample.channels != self.in_features:
            raise InvalidRequest(
                f"weight has {self.in_features} input features, the input has {sample.channels}",
                reason=Reason.CHANNEL_MISMATCH,
                metadata={"channels": str(sample.channels), "expected": str(self.in_features)},
                field="sample_shape",
            )
        return SampleShape.of_vector(self.out_features)

    def seen_channels(self, channel: int) -> range:
        """The whole vector."""
        return range(self.in_features)

    @property
    def filter_size(self) -> int:
        """in_features."""
        return self.in_features

    def window(self, sample: SampleShape) -> AxisWindow:
        """A vector is one row."""
        return AxisWindow(kernel=1)

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The whole vector, whichever neuron `index` is."""
        sample = split_shape(input_shape, 0)[1]
        checked_index(index, (self.output_sample(sample).channels,))
        return ReceptiveField((), (), PaddingMode.ZEROS, range(self.in_features))

    def canonical(self) -> dict[str, Any]:
        """The contract's canonical form, with the digests of the weights."""
        return {
            "type": "linear",
            "weight": digest_of(self.filters),
            "bias": digest_of(self.thresholds),
            "activation": self.activation.canonical_function(),
        }

    def __repr__(self) -> str:
        return (
            f"Linear(weight {self.filters.shape} {self.filters.dtype}, bias={self.thresholds is not None},"
            f" activation={self.activation.function!r})"
        )
