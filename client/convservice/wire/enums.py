"""The contract's enums as the SDK's own values, both ways, with unknown numbers refused."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

from convservice.bands import DataFormat
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import PaddingMode
from convservice.layers import FUNCTIONS


class Precision(StrEnum):
    """What an algorithm may do to the last bits: `high` sums a neuron's own products and nothing else."""

    HIGH = "high"
    FAST = "fast"


T = TypeVar("T")

# Each value stands at its number on the wire; number 0, "not said", stands for the default.
DATA_FORMATS = (DataFormat.CHANNELS_FIRST, DataFormat.CHANNELS_FIRST, DataFormat.CHANNELS_LAST)
PADDING_MODES = (PaddingMode.ZEROS, PaddingMode.ZEROS, PaddingMode.REFLECT, PaddingMode.REPLICATE)
PRECISIONS = (Precision.HIGH, Precision.HIGH, Precision.FAST)
ACTIVATIONS = ("linear", *FUNCTIONS)


def number_of(values: Sequence[T], value: T) -> int:
    """The number of a value, never 0."""
    return 1 + values[1:].index(value)


def value_of(values: Sequence[T], number: int, field: str) -> T:
    """The value of a number.

    Raises:
        InvalidRequest: `INVALID_PARAMETER` for a number that this version does not know.
    """
    if not 0 <= number < len(values):
        raise InvalidRequest(
            f"{field} is {number}, which this version does not know; known are 0 to {len(values) - 1}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": field, "value": str(number)},
            field=field,
        )
    return values[number]
