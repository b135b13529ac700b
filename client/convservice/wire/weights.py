"""Weight tensors, as objects and as messages: references by digest, and tensors with their bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from convservice.dtypes import DType, dtype_of_wire
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, MAX_SIZE
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import MAX_TENSOR_BYTES

MAX_WEIGHT_AXES = 2 + 2 * MAX_RANK
"""Axes of the largest weights: those that have filters for every position."""


def reference_to_proto(tensor: Tensor) -> pb.TensorReference:
    """A weight tensor's digest, type and shape."""
    return pb.TensorReference(
        digest=tensor.digest, data_type=pb.DataType.ValueType(tensor.dtype.wire), shape=tensor.shape
    )


def reference_from_proto(message: pb.TensorReference, name: str) -> Tensor:
    """A weight tensor known by its digest alone.

    Raises:
        InvalidRequest: a digest that is not 32 bytes, a type that is no float, a size below 1.
    """
    if len(message.digest) != 32:
        raise InvalidRequest(
            f"{name}: a digest has 32 bytes, not {len(message.digest)}",
            reason=Reason.INVALID_NETWORK,
            field=name,
        )
    dtype, shape = _weight_type(message.data_type, message.shape, name)
    return Tensor.reference(message.digest, dtype, shape)


def weight_to_proto(tensor: Tensor) -> pb.WeightTensor:
    """A weight tensor with its bytes."""
    data_type = pb.DataType.ValueType(tensor.dtype.wire)
    return pb.WeightTensor(data_type=data_type, shape=tensor.shape, data=bytes(tensor.packed()))


def weight_from_proto(message: pb.WeightTensor) -> Tensor:
    """A weight tensor with its own copy of the bytes.

    Raises:
        InvalidRequest: `PAYLOAD_SIZE` when the bytes are not those of the shape.
    """
    dtype, shape = _weight_type(message.data_type, message.shape, "weights")
    return weight_from_bytes(message.data, dtype, shape)


def weight_from_bytes(data: bytes | bytearray, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """A weight tensor with its own copy of packed bytes; `PAYLOAD_SIZE` when they are too many or few."""
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InvalidRequest(
            f"a weight tensor of shape {shape} {dtype} has {expected} bytes, {len(data)} were sent",
            reason=Reason.PAYLOAD_SIZE,
            metadata={"expected": str(expected), "bytes": str(len(data))},
            field="data",
        )
    packed = np.frombuffer(data, dtype=dtype.packed).reshape(shape)
    return Tensor.adopt(np.array(packed, dtype=dtype.numpy, order="C", copy=True))


def _weight_type(number: int, shape: Sequence[int], name: str) -> tuple[DType, tuple[int, ...]]:
    dtype = dtype_of_wire(number, f"{name}.data_type")
    sizes = tuple(shape)
    if (
        not dtype.is_float
        or not 1 <= len(sizes) <= MAX_WEIGHT_AXES
        or not all(1 <= s <= MAX_SIZE for s in sizes)
    ):
        raise InvalidRequest(
            f"{name}: a weight tensor has a float dtype and 1 to {MAX_WEIGHT_AXES} sizes from 1 to"
            f" {MAX_SIZE}, not {dtype} and {sizes}",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(sizes), "data_type": dtype.name},
            field=name,
        )
    if math.prod(sizes) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise InvalidRequest(
            f"{name}: a weight tensor of shape {sizes} is larger than {MAX_TENSOR_BYTES} bytes",
            reason=Reason.SIZE_OVERFLOW,
            field=name,
        )
    return dtype, sizes
