"""Elementwise functions, as layers and behind layers."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import AxisWindow, SampleShape
from convservice.layers.base import Layer, ReceptiveField, elementwise_field

FUNCTIONS = ("linear", "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu")
"""The activation functions, in the order of their numbers on the wire (from 1)."""


@dataclass(frozen=True)
class Activation(Layer):
    """An elementwise function, as a layer of its own or fused behind a convolution.

    Args:
        function: `linear`, `relu`, `leaky_relu`, `sigmoid`, `tanh`, `gelu` (with erf) or `silu`.
        negative_slope: slope of `leaky_relu` for negative values, finite.

    Raises:
        InvalidRequest: `INVALID_PARAMETER` for an unknown function or a slope that is not finite.
    """

    function: str = "linear"
    negative_slope: float = 0.01

    type_name: ClassVar[str] = "Activation"

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise InvalidRequest(
                f"activation must be one of {', '.join(FUNCTIONS)}, not {self.function!r}",
                reason=Reason.INVALID_PARAMETER,
                metadata={"name": "activation", "value": repr(self.function)},
                field="activation",
            )
        slope = self.negative_slope
        if isinstance(slope, bool) or not isinstance(slope, int | float) or not math.isfinite(slope):
            raise InvalidRequest(
                f"negative_slope must be a finite number, not {slope!r}",
                reason=Reason.INVALID_PARAMETER,
                metadata={"name": "negative_slope", "value": repr(slope)},
                field="negative_slope",
            )
        object.__setattr__(self, "negative_slope", float(slope))

    @property
    def rank(self) -> None:
        """None: data of any rank."""
        return None

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """The shape of the input."""
        return sample

    def window(self, sample: SampleShape) -> AxisWindow:
        """One row for one row."""
        return AxisWindow(kernel=1)

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The one position at `index`."""
        return elementwise_field(index, input_shape)

    def canonical(self) -> dict[str, Any]:
        """`{"type": "activation", "activation": ...}`."""
        return {"type": "activation", "activation": self.canonical_function()}

    def canonical_function(self) -> dict[str, Any]:
        """`{"function": name}`, with the slope's bits for `leaky_relu`."""
        form: dict[str, Any] = {"function": self.function}
        if self.function == "leaky_relu":
            form["negative_slope"] = struct.pack(">d", self.negative_slope).hex()
        return form


def activation_of(value: str | Activation | None) -> Activation:
    """An `Activation` from what the SDK takes: None (linear), a name, or an `Activation`."""
    if isinstance(value, Activation):
        return value
    return Activation() if value is None else Activation(value)
