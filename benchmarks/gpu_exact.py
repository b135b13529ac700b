"""What layers beside the convolution give, in extended precision: plain loops over outputs.

`exact` is given a layer and its inputs and hands on, for every output, the value before the one rounding, the
sum of the magnitudes that it is made of, and how many there are: what the promised bound is made of. It
shares the geometry with the kernels and no arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.geometry import SampleShape
from convservice.layers import (
    Add,
    AvgPool,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
    TransposedWindow,
)

Array = NDArray[Any]
Seen = tuple[tuple[Any, ...], tuple[int, ...]]
"""A place in the input, an index of all axes, and the weight that looks there."""


@dataclass(frozen=True)
class Exact:
    """What a layer should give; arrays (N, channels, rows, *rest) in extended precision.

    Attributes:
        value: before the one rounding.
        magnitude: the sum of the magnitudes of all that was added.
        terms: how many were, at most; 0 where nothing is added or divided.
    """

    value: Array
    magnitude: Array
    terms: int

    def bound(self, sums: DType, out: DType) -> Array:
        """How far a result may be off: rule 2 of the promise, an activation of linear or relu."""
        added = (self.terms + 3) * sums.roundoff * self.magnitude + self.terms * sums.smallest_normal
        rounded = out.roundoff * np.abs(self.value) + out.smallest_normal
        return np.asarray((added if self.terms else 0) + rounded)


def exact(layer: Layer, inputs: Sequence[Array]) -> Exact:
    """A layer's feature map.

    Args:
        layer: with an activation of linear or relu.
        inputs: (N, channels, *spatial) each; a fully connected layer's before it is flattened.
    """
    xs = [x.astype(np.longdouble) for x in inputs]
    x = xs[0]
    match layer:
        case MaxPool() | AvgPool():
            return _pooled(layer, x)
        case ConvTranspose():
            return _transposed(layer, x)
        case LocallyConnected():
            return _local(layer, x)
        case GlobalMaxPool() | GlobalAvgPool():
            return _globally_pooled(layer, x)
        case Linear():
            return _connected(layer, x.reshape(len(x), -1))
        case Flatten():
            flat = x.reshape(len(x), -1, 1)
            return Exact(flat, np.abs(flat), 0)
        case Add():
            value = np.sum(xs, axis=0)
            activated = np.maximum(value, 0) if layer.activation.function == "relu" else value
            return Exact(activated, np.sum([np.abs(each) for each in xs], axis=0), len(xs))
        case _:
            raise TypeError(f"there is no rule for a {layer.type_name}")


def _places(layer: Any, x: Array) -> Iterator[tuple[tuple[int, ...], list[Seen], list[range]]]:
    """Every output position with the real places that it looks at, and all positions along each axis."""
    sample = SampleShape(x.shape[1], x.shape[2], x.shape[3:])
    out = layer.output_sample(sample)
    windows, sizes = layer.windows(sample), x.shape[2:]
    for at in itertools.product(*(range(size) for size in (out.height, *out.rest))):
        axes = [window.positions(index) for window, index in zip(windows, at, strict=True)]
        seen: list[Seen] = []
        for place in itertools.product(*axes):
            if all(0 <= p < size for p, size in zip(place, sizes, strict=True)):
                taps = (_tap(*each) for each in zip(windows, at, place, strict=True))
                seen.append((_index(place), tuple(taps)))
        yield at, seen, axes


def _tap(window: Any, index: int, place: int) -> int:
    """The weight with which output `index` looks at a place."""
    if isinstance(window, TransposedWindow):
        return (index + window.before - place * window.stride) // window.dilation
    return int((place - index * window.stride + window.before) // window.dilation)


def _index(at: tuple[int, ...], before: int = 2) -> tuple[Any, ...]:
    """One position of all samples and channels, or of all that so many axes before it have."""
    return (*(slice(None) for _ in range(before)), *at)


def _empty(layer: Layer, x: Array) -> Array:
    out = layer.output_sample(SampleShape(x.shape[1], x.shape[2], x.shape[3:]))
    return np.zeros((len(x), out.channels, out.height, *out.rest), np.longdouble)


def _pooled(layer: MaxPool | AvgPool, x: Array) -> Exact:
    value, magnitude, terms = _empty(layer, x), _empty(layer, x), 1
    windows = layer.windows(SampleShape(x.shape[1], x.shape[2], x.shape[3:]))
    for at, seen, axes in _places(layer, x):
        here = _index(at)
        found = np.array([x[place] for place, _ in seen]).reshape(-1, *x.shape[:2])
        if isinstance(layer, MaxPool):
            value[here] = found.max(axis=0, initial=-np.inf)
            continue
        ends = [size + window.after for size, window in zip(x.shape[2:], windows, strict=True)]
        counted = [sum(p < end for p in axis) for axis, end in zip(axes, ends, strict=True)]
        count = math.prod(counted) if layer.count_include_pad else len(seen)
        terms = max(terms, len(seen))
        value[here] = found.sum(axis=0) / count
        magnitude[here] = np.abs(found).sum(axis=0) / count
    return Exact(value, magnitude, 0 if isinstance(layer, MaxPool) else terms)


def _transposed(layer: ConvTranspose, x: Array) -> Exact:
    """Its weights are (in_channels, out_channels / groups, *kernel)."""
    given, of_group = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    weight = layer.weight.astype(np.longdouble).reshape(layer.groups, given, of_group, *layer.kernel)
    return _summed(layer, x, weight)


def _local(layer: LocallyConnected, x: Array) -> Exact:
    """Its weights are (out_channels, in_channels / groups, *output_spatial, *kernel)."""
    of_group = layer.out_channels // layer.groups
    weight = layer.weight.astype(np.longdouble).reshape(layer.groups, of_group, *layer.weight.shape[1:])
    return _summed(layer, x, weight.swapaxes(1, 2))


def _summed(layer: ConvTranspose | LocallyConnected, x: Array, weight: Array) -> Exact:
    """Every output's products, with weights (groups, channels, filters, [*position,] *kernel)."""
    value, magnitude = _empty(layer, x), _empty(layer, x)
    _, given, of_group = weight.shape[:3]
    for at, seen, _ in _places(layer, x):
        for place, tap in seen:
            own = weight[_index((*at, *tap) if isinstance(layer, LocallyConnected) else tap, before=3)]
            fields = x[place].reshape(len(x), layer.groups, given)
            for into, xs, ws in ((value, fields, own), (magnitude, np.abs(fields), np.abs(own))):
                into[_index(at)] += np.einsum("ngi,gio->ngo", xs, ws).reshape(len(x), layer.groups * of_group)
    return _finished(layer, value, magnitude, given * math.prod(layer.kernel))


def _connected(layer: Linear, flat: Array) -> Exact:
    weight, shape = layer.weight.astype(np.longdouble), (len(flat), layer.out_features, 1)
    sums, sizes = weight @ flat.T, np.abs(weight) @ np.abs(flat).T
    return _finished(layer, sums.T.reshape(shape), sizes.T.reshape(shape), layer.in_features)


def _globally_pooled(layer: GlobalMaxPool | GlobalAvgPool, x: Array) -> Exact:
    axes = tuple(range(2, x.ndim))
    if isinstance(layer, GlobalMaxPool):
        value = x.max(axis=axes, keepdims=True)
        return Exact(value, np.abs(value), 0)
    magnitude = np.abs(x).mean(axis=axes, keepdims=True)
    return Exact(x.mean(axis=axes, keepdims=True), magnitude, math.prod(x.shape[2:]))


def _finished(layer: Any, sums: Array, magnitude: Array, products: int) -> Exact:
    """With thresholds, (channels,) or (channels, *spatial), and the activation."""
    if layer.bias is not None:
        bias = layer.bias.astype(np.longdouble)
        bias = bias.reshape(*bias.shape, *(1 for _ in range(sums.ndim - 1 - bias.ndim)))
        sums, magnitude = sums + bias, magnitude + np.abs(bias)
    value = np.maximum(sums, 0) if layer.activation.function == "relu" else sums
    return Exact(value, magnitude, products)
