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

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import real_position
from convservice.layers import Activation, Conv


@dataclass(frozen=True)
class NeuronView:
    """What a neuron sees and gives.

    Attributes:
        neuron: its position in the feature map.
        channel: its channel in the feature map.
        axes: per spatial axis the input positions it looks at; outside the input they lie in the padding.
        first_channel: the first input channel it looks at.
        values: (in_channels / groups, *kernel), float64.
        inside: (*kernel), whether the value is one of the input and not of the padding.
        weights: (in_channels / groups, *kernel), float64.
        products: (in_channels / groups, *kernel): value times weight.
        threshold: its bias, 0 where there is none.
        total: the exact sum of the products, rounded once.
        function: the activation's name.
        expected: what it gives.
        bound: largest difference from `expected` that the service promises to stay within.
    """

    neuron: tuple[int, ...]
    channel: int
    axes: tuple[range, ...]
    first_channel: int
    values: NDArray[np.float64]
    inside: NDArray[np.bool_]
    weights: NDArray[np.float64]
    products: NDArray[np.float64]
    threshold: float
    total: float
    function: str
    expected: float
    bound: float


def neuron_view(layer: Conv, sample: NDArray[Any], index: Sequence[int], channel: int = 0) -> NeuronView:
    """Takes one neuron apart.

    Args:
        layer: the convolution.
        sample: (in_channels, *spatial).
        index: the neuron's position, one integer per spatial axis.
        channel: its channel in the feature map.

    Raises:
        InvalidRequest: there is no such neuron, or the sample does not fit the layer.
    """
    field = layer.receptive_field(index, sample.shape)
    if not 0 <= channel < layer.out_channels:
        raise InvalidRequest(
            f"channel must be from 0 to {layer.out_channels - 1}, not {channel}: the layer has"
            f" {layer.out_channels} filters",
            reason=Reason.INVALID_PARAMETER,
            field="channel",
        )
    seen_channels = layer.weight.shape[1]
    first = channel // (layer.out_channels // layer.groups) * seen_channels
    read = [
        [real_position(position, size, field.mode) for position in axis]
        for axis, size in zip(field.axes, field.sizes, strict=True)
    ]
    at = np.ix_(range(first, first + seen_channels), *([place or 0 for place in axis] for axis in read))
    reads_input = _grid([[place is not None for place in axis] for axis in read])
    values = np.where(reads_input, sample[at].astype(np.float64), 0.0)
    within = [[0 <= p < size for p in axis] for axis, size in zip(field.axes, field.sizes, strict=True)]
    weights = layer.weight[channel].astype(np.float64)
    threshold = 0.0 if layer.bias is None else float(layer.bias[channel])
    with np.errstate(invalid="ignore", over="ignore"):
        products = values * weights
    terms = products.ravel().tolist()
    before = _sum([*terms, threshold])
    return NeuronView(
        neuron=tuple(index),
        channel=channel,
        axes=field.axes,
        first_channel=first,
        values=values,
        inside=_grid(within),
        weights=weights,
        products=products,
        threshold=threshold,
        total=_sum(terms),
        function=layer.activation.function,
        expected=activated(layer.activation, before),
        bound=_bound(layer, terms, before, _sum([abs(term) for term in (*terms, threshold)])),
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


def _bound(layer: Conv, products: Sequence[float], before: float, magnitude: float) -> float:
    """How far the service's answer may be from what the neuron gives: what it promises of a convolution.

    L ((K + 3) u_acc M + K eta_acc) + T + u_out |y| + eta_out, with L the activation's steepest slope, M the
    sum's magnitude, T the activation's own error, and eta a type's smallest normal number.
    """
    out, activation = layer.filters.dtype, layer.activation
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
