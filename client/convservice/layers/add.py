"""The sum of feature maps: where the branches of a residual block meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import AxisWindow, SampleShape
from convservice.layers.activation import Activation, activation_of
from convservice.layers.base import Layer, ReceptiveField, elementwise_field


class Add(Layer):
    """The sum of two or more feature maps of one shape, element by element, then the activation.

    Its branches may have different delays: what the faster ones bring is held until the slowest has come.

    Args:
        activation: a function's name or an `Activation`.

    Raises:
        InvalidRequest: `INVALID_PARAMETER` for an unknown function.
    """

    type_name: ClassVar[str] = "Add"
    fewest_inputs: ClassVar[int] = 2
    most_inputs: ClassVar[int | None] = None

    def __init__(self, activation: str | Activation | None = None) -> None:
        self.activation = activation_of(activation)

    @property
    def rank(self) -> None:
        """None: data of any rank."""
        return None

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """The shape of each input."""
        return sample

    def joined_sample(self, samples: Sequence[SampleShape]) -> SampleShape:
        """The shape that all inputs have.

        Raises:
            InvalidRequest: `INVALID_SHAPE` where one differs.
        """
        first = samples[0]
        for port, sample in enumerate(samples):
            if sample != first:
                raise InvalidRequest(
                    f"all inputs of Add must have one shape, input 0 has {first} and input {port} {sample}",
                    reason=Reason.INVALID_SHAPE,
                    metadata={"first": str(first), "other": str(sample), "port": str(port)},
                    field="sample_shape",
                )
        return first

    def window(self, sample: SampleShape) -> AxisWindow:
        """One row for one row."""
        return AxisWindow(kernel=1)

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The one position at `index`, in every input."""
        return elementwise_field(index, input_shape)

    def canonical(self) -> dict[str, Any]:
        """`{"type": "add", "activation": ...}`."""
        return {"type": "add", "activation": self.activation.canonical_function()}

    def __repr__(self) -> str:
        return f"Add(activation={self.activation.function!r})"
