"""One neuron taken apart: what it looks at, with which weights, and what they add up to.

Given a layer, a sample and a neuron's position this hands back every value, weight and product and their
sum, computed here in float64, with the bound within which a backend's answer must lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import FLOAT32, DType, dtype_of
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import SampleShape, real_position
from convservice.layers import (
    Activation,
    AvgPool,
    Conv,
    ConvTranspose,
    GlobalMaxPool,
    GlobalPool,
    Layer,
    LocallyConnected,
    MaxPool,
    Pool,
)

Weighted = Conv | ConvTranspose | LocallyConnected
Windowed = Weighted | Pool | GlobalPool


@dataclass(frozen=True)
class NeuronPlace:
    """Where a neuron is and what it looks at.

    Attributes:
        neuron: its position in the feature map.
        channel: its channel in the feature map.
        axes: per spatial axis the input positions it looks at; outside the input they lie in the padding.
        first_channel: the first input channel it looks at.
        values: (in_channels / groups, *kernel), float64; one channel for pooling.
        inside: (*kernel), whether the value is one of the input and not of the padding.
    """

    neuron: tuple[int, ...]
    channel: int
    axes: tuple[range, ...]
    first_channel: int
    values: NDArray[np.float64]
    inside: NDArray[np.bool_]


@dataclass(frozen=True)
class NeuronView(NeuronPlace):
    """What a neuron sees and gives.

    Attributes:
        weights: (in_channels / groups, *kernel), float64; None for pooling, which has none.
        products: (in_channels / groups, *kernel): value times weight; None for pooling.
        threshold: its bias, 0 where there is none.
        total: the exact sum of the products, rounded once; for pooling the largest value, or the mean.
        divisor: what the mean divides by; 0 for every other layer.
        function: the activation's name.
        expected: what it gives.
        bound: largest difference from `expected` that the service promises to stay within.
    """

    weights: NDArray[np.float64] | None
    products: NDArray[np.float64] | None
    threshold: float
    total: float
    divisor: int
    function: str
    expected: float
    bound: float


def neuron_view(layer: Layer, sample: NDArray[Any], index: Sequence[int], channel: int = 0) -> NeuronView:
    """Takes one neuron apart.

    Args:
        layer: a convolution of any kind, or pooling.
        sample: (in_channels, *spatial).
        index: the neuron's position, one integer per spatial axis.
        channel: its channel in the feature map.

    Raises:
        InvalidRequest: there is no such neuron, the layer has no windows, or the sample does not fit it.
    """
    if not isinstance(layer, Windowed):
        raise InvalidRequest(
            f"{layer.type_name} has no windows to look through; convolutions and pooling have",
            reason=Reason.INVALID_PARAMETER,
            field="layer",
        )
    field = layer.receptive_field(index, (1, *sample.shape))
    channels = layer.output_shape((1, *sample.shape))[1]
    if not 0 <= channel < channels:
        raise InvalidRequest(
            f"channel must be from 0 to {channels - 1}, not {channel}: the feature map has so many",
            reason=Reason.INVALID_PARAMETER,
            field="channel",
        )
    read = [
        [real_position(position, size, field.mode) for position in axis]
        for axis, size in zip(field.axes, field.sizes, strict=True)
    ]
    seen = layer.seen_channels(channel)
    at = np.ix_(seen, *([place or 0 for place in axis] for axis in read))
    reads_input = _grid([[place is not None for place in axis] for axis in read])
    values = np.where(reads_input, sample[at].astype(np.float64), 0.0)
    inside = _grid(
        [[0 <= p < size for p in axis] for axis, size in zip(field.axes, field.sizes, strict=True)]
    )
    place = NeuronPlace(tuple(index), channel, field.axes, seen.start, values, inside)
    if isinstance(layer, Pool | GlobalPool):
        given = dtype_of(sample.dtype)
        return _pooled(layer, place, sample.shape, given if given.is_float else FLOAT32)
    return _weighted(layer, place, sample.shape)


def _weighted(layer: Weighted, place: NeuronPlace, shape: tuple[int, ...]) -> NeuronView:
    """A neuron that adds up products."""
    weights = _weights(layer, place, shape).astype(np.float64)
    bias, at = layer.bias, (place.channel, *place.neuron)
    threshold = 0.0 if bias is None else float(bias[at[: bias.ndim]])
    with np.errstate(invalid="ignore", over="ignore"):
        products = place.values * weights
    terms = products.ravel().tolist()
    before = _sum([*terms, threshold])
    magnitude = _sum([abs(term) for term in (*terms, threshold)])
    return NeuronView(
        **vars(place),
        weights=weights,
        products=products,
        threshold=threshold,
        total=_sum(terms),
        divisor=0,
        function=layer.activation.function,
        expected=activated(layer.activation, before),
        bound=_bound(layer.filters.dtype, layer.activation, terms, before, magnitude),
    )


def _weights(layer: Weighted, place: NeuronPlace, shape: tuple[int, ...]) -> NDArray[Any]:
    """The weight on each value."""
    if isinstance(layer, Conv):
        found: NDArray[Any] = layer.weight[place.channel]
        return found
    if isinstance(layer, LocallyConnected):
        at: tuple[Any, ...] = (place.channel, slice(None), *place.neuron)
        return np.asarray(layer.weight[at])
    windows = layer.windows(SampleShape(shape[0], shape[1], shape[2:]))
    taps = [
        [(i + window.before - p * window.stride) // window.dilation for p in axis]
        for i, window, axis in zip(place.neuron, windows, place.axes, strict=True)
    ]
    first, count = place.first_channel, len(place.values)
    own = place.channel % (layer.out_channels // layer.groups)
    filters = layer.weight[first : first + count, own]
    return filters[np.ix_(range(count), *taps)]


def _pooled(layer: Pool | GlobalPool, place: NeuronPlace, shape: tuple[int, ...], dtype: DType) -> NeuronView:
    """A neuron that takes the largest value, or the mean."""
    real = place.values[0][place.inside].tolist()
    divisor, bound = 0, 0.0
    if isinstance(layer, MaxPool | GlobalMaxPool):
        total = math.nan if any(map(math.isnan, real)) else max(real, default=-math.inf)
    else:
        counted = place.inside.size
        if isinstance(layer, AvgPool):
            windows = layer.windows(SampleShape(shape[0], shape[1], shape[2:]))
            ends = zip(place.axes, shape[1:], windows, strict=True)
            whole = math.prod(sum(p < size + window.after for p in axis) for axis, size, window in ends)
            counted = whole if layer.count_include_pad else len(real)
        divisor, total = counted, _sum(real) / counted
        magnitude = _sum([abs(value) for value in real]) / counted
        bound = _bound(dtype, Activation(), real, total, magnitude)
    return NeuronView(
        **vars(place),
        weights=None,
        products=None,
        threshold=0.0,
        total=total,
        divisor=divisor,
        function="linear",
        expected=total,
        bound=bound,
    )


def _grid(axes: Sequence[Sequence[bool]]) -> NDArray[np.bool_]:
    """True where every axis is: an array with one axis for each."""
    return reduce(np.logical_and.outer, (np.array(axis) for axis in axes))


def _sum(terms: Sequence[float]) -> float:
    """The exact sum, rounded once; where infinities or an overflow leave none, what floats add up to."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):
        return sum(terms)


def _bound(
    out: DType, activation: Activation, products: Sequence[float], before: float, magnitude: float
) -> float:
    """How far the service's answer may be from what the neuron gives: what it promises of a convolution.

    L ((K + 3) u_acc M + K eta_acc) + T + u_out |y| + eta_out, with L the activation's steepest slope, M the
    sum's magnitude, T the activation's own error, and eta a type's smallest normal number.
    """
    u, eta = out.accumulator.roundoff, out.accumulator.smallest_normal
    value = abs(activated(activation, before))
    linear = (len(products) + 3) * u * magnitude + len(products) * eta
    rounding = out.roundoff * value + out.smallest_normal
    match activation.function:
        case "linear" | "relu":
            return linear + rounding
        case "leaky_relu":
            return max(1.0, abs(activation.negative_slope)) * linear + 2 * u * value + rounding
        case "gelu":
            return 1.13 * linear + 12 * u * abs(before) + eta + rounding
        case function:
            steepest = {"sigmoid": 0.25, "tanh": 1.0, "silu": 1.1}[function]
            return steepest * linear + 12 * u * value + eta * (1 + abs(before)) + rounding


def activated(activation: Activation, x: float) -> float:
    """The activation function of one value, in float64; NaN stays NaN."""
    match activation.function:
        case "relu":
            return 0.0 if x <= 0 else x
        case "leaky_relu":
            return x if x >= 0 else activation.negative_slope * x
        case "sigmoid":
            return _sigmoid(x)
        case "tanh":
            return math.tanh(x)
        case "gelu":
            return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))
        case "silu":
            return x * _sigmoid(x)
        case _:
            return x


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return (1.0 if x >= 0 else small) / (1.0 + small)
