"""The element types that tensors may have.

One row per type: its name, its number on the wire, its size, the type its sums are kept in, and the
constants that the error bounds use. Everything that asks "which dtype" asks here; it is given a NumPy
dtype, a name or a wire number and hands back a `DType`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from convservice.errors import InvalidRequest, Reason

DTypeLike = Any
"""What `dtype_of` takes: a `DType`, its name, or whatever `numpy.dtype` takes."""


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: as NumPy and the contract's hashes spell it, `"float32"`.
        wire: its number in `convservice.v1.DataType`.
        itemsize: bytes per element.
        is_float: whether it is a float type (weights and biases are).
        accumulator_name: the type that sums, bias and activation are computed in.
        roundoff: the unit roundoff u (half the distance from 1 to the next number); 0 for integers.
        smallest_normal: the smallest normal positive number; 0 for integers.
    """

    name: str
    wire: int
    itemsize: int
    is_float: bool
    accumulator_name: str
    roundoff: float
    smallest_normal: float

    @property
    def numpy(self) -> np.dtype[Any]:
        """The native NumPy dtype. bfloat16 needs the package `ml_dtypes`."""
        if self.name == "bfloat16":
            return _bfloat16()
        return np.dtype(self.name)

    @property
    def packed(self) -> np.dtype[Any]:
        """The NumPy dtype of this type's bytes on the wire: little-endian."""
        return self.numpy.newbyteorder("<")

    @property
    def accumulator(self) -> DType:
        """The type in which sums of this type are kept."""
        return _BY_NAME[self.accumulator_name]

    def __str__(self) -> str:
        return self.name


def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as exc:
        raise InvalidRequest(
            "bfloat16 needs the package ml_dtypes: pip install 'convservice[bfloat16]'",
            reason=Reason.UNKNOWN_DATA_TYPE,
        ) from exc
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


DTYPES = (
    DType("float32", 1, 4, True, "float32", 2.0**-24, 2.0**-126),
    DType("float64", 2, 8, True, "float64", 2.0**-53, 2.0**-1022),
    DType("float16", 3, 2, True, "float32", 2.0**-11, 2.0**-14),
    DType("bfloat16", 4, 2, True, "float32", 2.0**-8, 2.0**-126),
    DType("uint8", 5, 1, False, "float32", 0.0, 0.0),
    DType("int8", 6, 1, False, "float32", 0.0, 0.0),
    DType("uint16", 7, 2, False, "float32", 0.0, 0.0),
    DType("int16", 8, 2, False, "float32", 0.0, 0.0),
)
"""Every type, in the order of its wire number."""

_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_BY_WIRE = {dtype.wire: dtype for dtype in DTYPES}

FLOAT32 = _BY_NAME["float32"]
FLOAT64 = _BY_NAME["float64"]


def dtype_of(value: DTypeLike) -> DType:
    """The `DType` of a name, a NumPy dtype or scalar type, or an array's `dtype`; any byte order.

    Raises:
        InvalidRequest: `UNKNOWN_DATA_TYPE` when the service has no such type.
    """
    if isinstance(value, DType):
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    try:
        name = np.dtype(value).name
    except (TypeError, ValueError, SyntaxError):
        name = str(value)
    found = _BY_NAME.get(name)
    if found is None:
        raise InvalidRequest(
            f"dtype {name} is not supported; the service takes {', '.join(_BY_NAME)}",
            reason=Reason.UNKNOWN_DATA_TYPE,
            metadata={"data_type": name},
        )
    return found


def dtype_of_wire(number: int, field: str) -> DType:
    """The `DType` of a `convservice.v1.DataType` number.

    Args:
        number: the enum value.
        field: the message field it stood in, for the error.

    Raises:
        InvalidRequest: `UNKNOWN_DATA_TYPE` for 0 and for numbers that this version does not know.
    """
    found = _BY_WIRE.get(number)
    if found is None:
        raise InvalidRequest(
            f"{field} is {number}, which is no known data type; known are 1 to {len(DTYPES)}",
            reason=Reason.UNKNOWN_DATA_TYPE,
            metadata={"data_type": str(number)},
            field=field,
        )
    return found
