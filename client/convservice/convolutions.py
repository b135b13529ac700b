"""What the sync and the async client have in common: settings, and the convolutions.

`conv1d`, `conv2d` and `conv3d` are said once here; each makes a network of one layer and hands it with its
checked input to the client's own way of sending.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convservice.arrays import AXES, Options, as_bare_input, as_input
from convservice.bands import DataFormat
from convservice.dtypes import DTypeLike
from convservice.endpoint import Endpoint, check_timeout
from convservice.errors import InvalidRequest, Reason
from convservice.jobs import Job
from convservice.layers import Activation, Conv
from convservice.network import Network
from convservice.progress import ProgressLike
from convservice.tensors import as_array
from convservice.transfer import OnReport

R = TypeVar("R")

PerAxis = int | Sequence[int]
"""One integer, or one per spatial axis."""

Padding = int | str | Sequence[int] | Sequence[Sequence[int]]
"""An integer, one per axis, a (before, after) pair per axis, "same" or "valid"."""


class Convolutions(ABC, Generic[R]):
    """Settings of a client, and its convolutions; R is an array, or what is awaited for one."""

    def __init__(self, endpoint: Endpoint, timeout: float | None) -> None:
        self._endpoint = endpoint
        self._timeout = check_timeout(timeout)

    @property
    def target(self) -> str:
        """The server."""
        return self._endpoint.target

    @abstractmethod
    def _send(self, job: Job, options: Options, progress: ProgressLike, on_report: OnReport) -> R:
        """The result of a job."""

    def _options(
        self,
        data_format: str,
        out_dtype: DTypeLike | None,
        precision: str,
        backend: str | None,
        timeout: float | None,
    ) -> Options:
        limit = self._timeout if timeout is None else timeout
        return Options.of(data_format, out_dtype, precision, backend, limit)

    def conv1d(
        self,
        x: ArrayLike,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        activation: str | Activation | None = None,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        progress: ProgressLike = None,
        on_report: OnReport = None,
    ) -> R:
        """A convolution over one spatial axis: `conv2d` with x (N, C, L), (C, L), or bare (L,)."""
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        geometry: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "activation": activation,
        }
        return self._send(
            _job(1, x, weight, bias, geometry=geometry, options=options), options, progress, on_report
        )

    def conv2d(
        self,
        x: ArrayLike,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        activation: str | Activation | None = None,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        progress: ProgressLike = None,
        on_report: OnReport = None,
    ) -> R:
        """A convolution over two spatial axes (cross-correlation: the filter is not flipped).

        y[n, o, i, j] = bias[o] + sum over c, k, l of weight[o, c, k, l] * x[n, c, i*s+k*d-p, j*s+l*d-p],
        then the activation; stride s, dilation d and padding p per axis, as in PyTorch's `conv2d`.

        Args:
            x: (N, C, H, W), (C, H, W), or bare (H, W) beside a bare weight; channels last with that
                `data_format`. Of the weight's float dtype, or uint8, int8, uint16 or int16, which
                travel as they are. Any layout and byte order; never changed.
            weight: the filter bank (out_channels, C / groups, kh, kw), or bare (kh, kw); float32, float64,
                float16 or bfloat16.
            bias: the thresholds (out_channels,), of the weight's dtype; a single number beside a bare weight.
            stride: step between neighbouring neurons, one integer or one per axis, at least 1.
            padding: an integer, one per axis, a (before, after) pair per axis, "same" (output size
                ceil(size / stride)) or "valid" (none).
            dilation: step between neighbouring weights, one integer or one per axis, at least 1.
            groups: channel groups that do not see one another; divides both channel numbers.
            padding_mode: what the padding reads: "zeros", "reflect" or "replicate".
            activation: "linear", "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", or an `Activation`.
            data_format: "channels_first" or "channels_last", for x and the result.
            out_dtype: the result's dtype, the weight's if None; integers are rounded half to even and
                saturated.
            precision: "high", or "fast" to allow algorithms with a larger error bound.
            backend: a backend's name; None for the server's choice.
            timeout: seconds; None for the client's own.
            progress: True for a bar on standard error, or a function that takes each `Progress`; it may be
                called from another thread, one call at a time.
            on_report: a function that is given the `TensorReport`: backend, algorithms and times.

        Returns:
            The feature maps, in x's rank: (N, out_channels, H', W'), (out_channels, H', W') or (H', W').

        Raises:
            InvalidRequest: an argument breaks a rule; before anything is sent where the client can know.
            BackendUnavailable: the `backend` asked for cannot run there.
            ResourceExhausted: the server's memory is in use; `retry_after` says when to try again.
            DeadlineExceeded: `timeout` passed.
            ServiceUnavailable: the server cannot be reached; small calls have been tried again by then.
        """
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        geometry: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "activation": activation,
        }
        return self._send(
            _job(2, x, weight, bias, geometry=geometry, options=options), options, progress, on_report
        )

    def conv3d(
        self,
        x: ArrayLike,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        activation: str | Activation | None = None,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        progress: ProgressLike = None,
        on_report: OnReport = None,
    ) -> R:
        """A convolution over three spatial axes: `conv2d` with x (N, C, D, H, W), (C, D, H, W), (D, H, W)."""
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        geometry: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "activation": activation,
        }
        return self._send(
            _job(3, x, weight, bias, geometry=geometry, options=options), options, progress, on_report
        )


def _job(
    rank: int,
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    *,
    geometry: dict[str, Any],
    options: Options,
) -> Job:
    """The job of a convolution; a bare weight gets its two channel axes here."""
    filters, array = as_array("weight", weight), as_array("x", x)
    bare = filters.ndim == rank
    if bare != (array.ndim == rank) or filters.ndim not in (rank, rank + 2):
        raise _wrong_axes(rank, array, filters)
    if bare:
        filters = filters[None, None]
        bias = None if bias is None else np.atleast_1d(as_array("bias", bias))
    layer = Conv(filters, bias, **geometry)
    given = as_bare_input(array) if bare else as_input(array, rank, options.data_format)
    if bare:
        options = replace(options, data_format=DataFormat.CHANNELS_FIRST)
    return Job.of(Network([layer]), given, options)


def _wrong_axes(rank: int, x: NDArray[Any], weight: NDArray[Any]) -> InvalidRequest:
    axes, kernel = AXES[rank], ", ".join(f"k{axis.lower()}" for axis in AXES[rank].split(", "))
    return InvalidRequest(
        f"conv{rank}d takes x with channels and weight (out_channels, C / groups, {kernel}), or bare x"
        f" ({axes}) with a bare weight ({kernel}); x has shape {x.shape}, weight has shape {weight.shape}",
        reason=Reason.INVALID_SHAPE,
        metadata={"x": str(x.shape), "weight": str(weight.shape)},
        field="weight",
    )
