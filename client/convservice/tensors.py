"""Weight tensors: immutable, content-addressed.

Given an array, `Tensor.of` keeps a read-only copy that nobody else can change and knows its digest;
given a reference from the wire, `Tensor` knows digest, dtype and shape but has no values. Layers hold
tensors, networks are named by their digests, the server keeps each once.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convservice.dtypes import DType, dtype_of
from convservice.errors import InvalidRequest, NetworkNotFound, Reason

_DOMAIN = b"convservice.tensor.v1\0"


def tensor_digest(dtype: DType, shape: tuple[int, ...], data: memoryview) -> bytes:
    r"""The digest of a tensor: SHA-256 over `"convservice.tensor.v1\0"`, the dtype's name, `"\0"`, the rank
    as uint32, the sizes as uint64 (little-endian) and the packed bytes, as the contract states."""
    head = _DOMAIN + dtype.name.encode() + b"\0" + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    digest = hashlib.sha256(head)
    digest.update(data)
    return digest.digest()


@dataclass(frozen=True, eq=False)
class Tensor:
    """A weight tensor, or a reference to one.

    Attributes:
        dtype: the type of its elements.
        shape: its sizes.
        values: the read-only, C-contiguous array, or None where only the reference is known.
    """

    dtype: DType
    shape: tuple[int, ...]
    values: NDArray[Any] | None = field(repr=False)
    known_digest: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, array: Any, name: str = "weight") -> Tensor:
        """A tensor with its own copy of `array`, of any layout or byte order.

        Raises:
            InvalidRequest: it is no array, the dtype is no float type of the service, or a size is zero.
        """
        if isinstance(array, Tensor):
            return array
        given = as_array(name, array)
        dtype = _float_dtype(name, given.dtype)
        if 0 in given.shape:
            raise InvalidRequest(
                f"{name} has shape {given.shape}; every size must be at least 1",
                reason=Reason.INVALID_SHAPE,
                metadata={"shape": str(given.shape)},
                field=name,
            )
        return cls.adopt(np.array(given, dtype=dtype.numpy, order="C", copy=True))

    @classmethod
    def adopt(cls, array: NDArray[Any]) -> Tensor:
        """A tensor around `array` itself, which must be C-contiguous, native and nobody else's."""
        array.flags.writeable = False
        return cls(dtype_of(array.dtype), tuple(array.shape), array)

    @classmethod
    def reference(cls, digest: bytes, dtype: DType, shape: tuple[int, ...]) -> Tensor:
        """A tensor known by its digest alone."""
        return cls(dtype, shape, None, digest)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over type, shape and bytes: 32 bytes, the same on every machine."""
        if self.known_digest is not None:
            return self.known_digest
        return tensor_digest(self.dtype, self.shape, self.packed())

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def array(self) -> NDArray[Any]:
        """The values, read-only.

        Raises:
            NetworkNotFound: only a reference is known here.
        """
        if self.values is None:
            raise NetworkNotFound(
                f"the values of tensor sha256-{self.digest.hex()} are not here, only its shape {self.shape}",
                reason=Reason.WEIGHTS_MISSING,
                metadata={"digests": self.digest.hex()},
            )
        return self.values

    def packed(self) -> memoryview:
        """The bytes as they travel: packed, little-endian."""
        return as_bytes(np.ascontiguousarray(self.array.astype(self.dtype.packed, copy=False)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def as_array(name: str, value: ArrayLike) -> NDArray[Any]:
    """`value` as an array.

    Raises:
        InvalidRequest: `INVALID_SHAPE` for lists of uneven lengths and what else NumPy cannot take;
            `INVALID_PARAMETER` for a masked array with masked values, since masks do not travel.
    """
    given: Any = value
    if isinstance(value, np.ma.MaskedArray) and given.count() < given.size:
        count = given.size - given.count()
        raise InvalidRequest(
            f"{name} is a masked array, {count} of its {given.size} values are masked, and a mask does not"
            " travel: fill it first, for example with numpy.ma.filled(array, 0)",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": name, "masked": str(count)},
            field=name,
        )
    try:
        return np.asarray(given)
    except (ValueError, TypeError) as exc:
        raise InvalidRequest(
            f"{name} is not an array: {exc}", reason=Reason.INVALID_SHAPE, field=name
        ) from exc


def _float_dtype(name: str, given: np.dtype[Any]) -> DType:
    cure = f"convert it first, for example {name}.astype('float32')"
    try:
        dtype = dtype_of(given)
    except InvalidRequest as exc:
        raise InvalidRequest(
            f"{name}: {exc.message}; {cure}", reason=exc.reason, metadata=exc.metadata, field=name
        ) from exc
    if not dtype.is_float:
        raise InvalidRequest(
            f"{name} has dtype {dtype.name}; filters and thresholds are of a float dtype; {cure}",
            reason=Reason.DATA_TYPE_MISMATCH,
            metadata={"data_type": dtype.name},
            field=name,
        )
    return dtype


def as_bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)
