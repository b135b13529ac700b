"""What users pass, as tensors: ranks, axis orders and dtypes.

Given an array of any layout, byte order or rank and the options of a call, it checks what a client can
know, and hands on a view (samples, channels, rows, *rest) beside what is needed to give the result the
shape that the user expects. Nothing is copied here and the input is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convservice.bands import DataFormat
from convservice.dtypes import FLOAT64, DType, DTypeLike, dtype_of
from convservice.endpoint import check_timeout
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, SampleShape
from convservice.layers import split_shape
from convservice.network import Network
from convservice.tensors import as_array
from convservice.wire.enums import Precision

AXES = {1: "L", 2: "H, W", 3: "D, H, W"}
"""The names of the spatial axes, by rank."""


@dataclass(frozen=True)
class Options:
    """What a call says beside its tensor, checked.

    Attributes:
        data_format: order of the axes of input and results.
        out_dtype: the results' dtype; None for the network's own.
        precision: what algorithms are allowed.
        backend: a backend's name; empty for the server's choice.
        timeout: seconds, or None.
    """

    data_format: DataFormat
    out_dtype: DType | None
    precision: Precision
    backend: str
    timeout: float | None

    @classmethod
    def of(
        cls,
        data_format: str,
        out_dtype: DTypeLike | None,
        precision: str,
        backend: str | None,
        timeout: float | None,
    ) -> Options:
        """The options from what users pass.

        Raises:
            InvalidRequest: a value that is none of those allowed.
        """
        if backend is not None and (not isinstance(backend, str) or not backend):
            raise _bad(
                "backend",
                f"backend must be a backend's name, or None for the server's choice, not {backend!r}",
            )
        return cls(
            _member(DataFormat, "data_format", data_format),
            None if out_dtype is None else dtype_of(out_dtype),
            _member(Precision, "precision", precision),
            backend or "",
            check_timeout(timeout),
        )


@dataclass(frozen=True)
class Input:
    """A user's array as samples.

    Attributes:
        array: (samples, channels, rows, *rest), a view; vectors are (samples, features, 1).
        dtype: of its elements.
        batched: whether the user's array had an axis of samples.
        bare: whether it had spatial axes alone.
        vector: whether its samples are vectors.
    """

    array: NDArray[Any]
    dtype: DType
    batched: bool
    bare: bool = False
    vector: bool = False

    @property
    def sample(self) -> SampleShape:
        """The shape of each sample."""
        _, channels, rows, *rest = self.array.shape
        if self.vector:
            return SampleShape.of_vector(channels)
        return SampleShape(channels, rows, tuple(rest))


def as_input(x: ArrayLike, rank: int | None, data_format: DataFormat) -> Input:
    """A user's array (N, C, *spatial) or (C, *spatial), channels last where the format says so.

    Args:
        x: the array.
        rank: number of spatial axes, 0 for vectors (N, F) or (F,); None where the network takes any, and x
            must then have samples.
        data_format: order of its axes.

    Raises:
        InvalidRequest: `INVALID_SHAPE` or `UNKNOWN_DATA_TYPE`, with the numbers.
    """
    array = as_array("x", x)
    dtype = input_dtype(array.dtype)
    spatial = array.ndim - 2 if rank is None else rank
    if not 0 <= spatial <= MAX_RANK or array.ndim not in (spatial + 1, spatial + 2):
        raise InvalidRequest(
            f"x has {array.ndim} axes, {array.shape}; it must be {_layouts(rank, data_format)}",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(array.shape)},
            field="x",
        )
    if data_format is DataFormat.CHANNELS_LAST:
        array = np.moveaxis(array, -1, -spatial - 1)
    batched = array.ndim == spatial + 2
    split_shape(array.shape, spatial)
    samples = array if batched else array[None]
    if spatial == 0:
        return Input(samples[..., None], dtype, batched, vector=True)
    return Input(samples, dtype, batched)


def as_bare_input(x: ArrayLike) -> Input:
    """A user's array of spatial axes alone, (H, W) or the like, as one sample of one channel."""
    array = as_array("x", x)
    dtype = input_dtype(array.dtype)
    split_shape((1, *array.shape), array.ndim)
    return Input(array[None, None], dtype, batched=False, bare=True)


def input_dtype(dtype: DTypeLike) -> DType:
    """The `DType` of an input.

    Raises:
        InvalidRequest: `UNKNOWN_DATA_TYPE`, saying how to convert.
    """
    try:
        return dtype_of(dtype)
    except InvalidRequest as exc:
        raise InvalidRequest(
            f"x: {exc.message}; convert it first, for example with x.astype('float32')",
            reason=exc.reason,
            metadata=exc.metadata,
            field="x",
        ) from exc


def network_dtype(network: Network, given: DType) -> DType:
    """The network's dtype for an input of dtype `given`.

    Raises:
        InvalidRequest: `DATA_TYPE_MISMATCH`, saying how to convert.
    """
    try:
        return network.dtype(given)
    except InvalidRequest as exc:
        weights = exc.metadata["weight"]
        # float64 is what lists and much of NumPy make without being asked, so it is that which gives way
        cure = f"x.astype({weights!r})" if given is FLOAT64 else f"weight.astype({given.name!r})"
        raise InvalidRequest(
            f"{exc.message}; convert one, for example {cure}",
            reason=exc.reason,
            metadata=exc.metadata,
            field=exc.field,
        ) from exc


def result_shapes(network: Network, given: Input, data_format: DataFormat) -> dict[str, SampleShape]:
    """The sample shape of every output, by name.

    Raises:
        InvalidRequest: the input does not fit the network; where the axes look swapped, the message names
            `data_format`.
    """
    try:
        shapes = network.shapes(given.sample)
    except InvalidRequest as exc:
        hint = _format_hint(exc, given, data_format)
        if not hint:
            raise
        raise InvalidRequest(
            exc.message + hint, reason=exc.reason, metadata=exc.metadata, field=exc.field
        ) from exc
    return {name: shapes[node] for name, node in network.outputs.items()}


def _format_hint(exc: InvalidRequest, given: Input, data_format: DataFormat) -> str:
    """Says that channels seem to stand at the other end, when the size there is the one expected."""
    if exc.reason != Reason.CHANNEL_MISMATCH or given.vector:
        return ""
    axes = AXES[given.array.ndim - 2]
    _, channels, *spatial = given.array.shape
    if data_format is DataFormat.CHANNELS_LAST:
        if str(spatial[0]) != exc.metadata.get("expected"):
            return ""
        return f"; if x is (C, {axes}), leave out data_format='channels_last'"
    if str(spatial[-1]) != exc.metadata.get("expected"):
        return ""
    shape = (channels, *spatial)
    return f"; x was taken as (C, {axes}) = {shape}: if it is ({axes}, C), pass data_format='channels_last'"


def _layouts(rank: int | None, data_format: DataFormat) -> str:
    last = data_format is DataFormat.CHANNELS_LAST
    if rank is None:
        return "(N, *spatial, C)" if last else f"(N, C, *spatial) with at most {MAX_RANK} spatial axes"
    if rank == 0:
        return "(N, F) or (F,)"
    axes = AXES[rank]
    return f"(N, {axes}, C) or ({axes}, C)" if last else f"(N, C, {axes}) or (C, {axes})"


def _member(kind: Any, name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise _bad(name, f"{name} must be one of {', '.join(kind)}, not {value!r}") from None


def _bad(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.INVALID_PARAMETER, metadata={"name": name}, field=name)
