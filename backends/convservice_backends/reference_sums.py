"""The sums of the reference: every layer's, written down as its definition says, in plain loops.

Given a layer and its input in float64, `sums_of` hands back for every neuron the exact sum (`math.fsum`)
before its activation, and what the error bound is made of; see `reference`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import FLOAT64, DType
from convservice.geometry import SampleShape, real_position
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)

EXACT_BELOW = 2.0**20
"""Sums of integers with sum |x||w| + |bias| below this must be exact on every backend."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Given:
    """What a layer received.

    Attributes:
        values: of each input, (N, channels, *spatial), vectors (N, features).
        errors: how far each is from what the backend had.
        own: the network's dtype.
    """

    values: tuple[Floats, ...]
    errors: tuple[Floats, ...]
    own: DType

    @property
    def sample(self) -> SampleShape:
        """The shape of one sample of each input."""
        _, channels, *spatial = self.values[0].shape
        return (
            SampleShape(channels, spatial[0], tuple(spatial[1:]))
            if spatial
            else SampleShape.of_vector(channels)
        )

    @property
    def is_exact(self) -> bool:
        """Whether the backend had these very values."""
        return not any(error.any() for error in self.errors)


@dataclass(frozen=True)
class Sums:
    """The weighted sums of one layer, before its activation; arrays of shape (N, channels, *spatial).

    Attributes:
        value: z*, the exact sum with its threshold.
        magnitude: M, the sum of |x||w| and |bias|, with |x| enlarged by the input's error.
        spread: what the input's error adds: the sum of e |w|.
        products: K, the most products in a sum.
        exact: whether a backend must give `value` exactly.
    """

    value: Floats
    magnitude: Floats
    spread: Floats
    products: int
    exact: bool


def sums_of(layer: Layer, given: Given) -> Sums:
    """The sums of any layer."""
    rules: dict[type[Layer], Callable[[Any, Given], Sums]] = {
        Activation: lambda _, given: _added(given),
        Add: lambda _, given: _added(given),
        AvgPool: _averaged,
        Conv: _convolved,
        ConvTranspose: _transposed,
        Flatten: lambda _, given: _laid_out(given),
        GlobalAvgPool: lambda _, given: _averaged_whole(given),
        GlobalMaxPool: lambda _, given: _largest_of_all(given),
        Linear: _connected,
        LocallyConnected: _locally_connected,
        MaxPool: _largest,
    }
    if type(layer) not in rules:
        raise TypeError(f"the reference has no rule for a {type(layer).__name__}")
    return rules[type(layer)](layer, given)


class _Neurons:
    """Sums that are filled in neuron by neuron.

    Args:
        shape: (N, channels, *spatial) of the feature map.
        own: the network's dtype.
    """

    def __init__(self, shape: tuple[int, ...], own: DType) -> None:
        self.value, self.magnitude, self.spread = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.products = 0
        self._wide = own == FLOAT64

    def add(
        self,
        at: tuple[int, ...],
        xs: Sequence[float],
        es: Sequence[float],
        ws: Sequence[float],
        threshold: float = 0.0,
    ) -> None:
        """The neuron at `at` sums x w over the values it looks at, each off by up to e, and the threshold."""
        self.value[at] = _exact_sum(xs, ws, threshold, wide=self._wide)
        self.magnitude[at] = _size([abs(x) + e for x, e in zip(xs, es, strict=True)], ws) + abs(threshold)
        self.spread[at] = _size(es, ws)
        self.products = max(self.products, len(xs))

    def sums(self, *, integers: bool) -> Sums:
        """The sums; `integers` says that all values, weights and thresholds are, and exact ones."""
        exact = integers and bool((self.magnitude < EXACT_BELOW).all())
        return Sums(self.value, self.magnitude, self.spread, self.products, exact)


def _convolved(layer: Conv, given: Given) -> Sums:
    """For each sample and position, for each filter, product by product."""
    sample, out = given.sample, layer.output_sample(given.sample)
    reads = _reads(layer, sample, out)
    weight = layer.weight.astype(np.float64)
    filters_per_group, channels_per_group = layer.out_channels // layer.groups, weight.shape[1]
    filters = weight.reshape(layer.out_channels, -1).tolist()
    thresholds = _thresholds(layer.bias, layer.out_channels)
    (x,), (error,) = given.values, given.errors
    neurons = _Neurons((len(x), *out.shape), given.own)
    for n, at in _places(len(x), out):
        places = list(itertools.product(*(reads[axis][i] for axis, i in enumerate(at))))
        for group in range(layer.groups):
            channels = range(group * channels_per_group, (group + 1) * channels_per_group)
            xs, es = _field(x[n], channels, places), _field(error[n], channels, places)
            for o in range(group * filters_per_group, (group + 1) * filters_per_group):
                neurons.add((n, o, *at), xs, es, filters[o], thresholds[o])
    return neurons.sums(integers=_whole(layer, given))


def _locally_connected(layer: LocallyConnected, given: Given) -> Sums:
    """As a convolution, with the weights of each position."""
    sample, out = given.sample, layer.output_sample(given.sample)
    reads = _reads(layer, sample, out)
    weight = layer.weight.astype(np.float64)
    filters_per_group, channels_per_group = layer.out_channels // layer.groups, weight.shape[1]
    bias = np.zeros(layer.out_channels) if layer.bias is None else layer.bias.astype(np.float64)
    (x,), (error,) = given.values, given.errors
    neurons = _Neurons((len(x), *out.shape), given.own)
    for n, at in _places(len(x), out):
        places = list(itertools.product(*(reads[axis][i] for axis, i in enumerate(at))))
        for o in range(layer.out_channels):
            group = o // filters_per_group
            channels = range(group * channels_per_group, (group + 1) * channels_per_group)
            filter_here = [w for c in range(channels_per_group) for w in weight[(o, c, *at)].flat]
            threshold = float(bias[o] if bias.ndim == 1 else bias[(o, *at)])
            xs, es = _field(x[n], channels, places), _field(error[n], channels, places)
            neurons.add((n, o, *at), xs, es, filter_here, threshold)
    return neurons.sums(integers=_whole(layer, given))


def _transposed(layer: ConvTranspose, given: Given) -> Sums:
    """An input value at p reaches the neurons p * stride - before + k * dilation through weight k."""
    out = layer.output_sample(given.sample)
    weight = layer.weight.astype(np.float64)
    group_in, group_out = layer.in_channels // layer.groups, weight.shape[1]
    thresholds = _thresholds(layer.bias, layer.out_channels)
    (x,), (error,) = given.values, given.errors
    neurons = _Neurons((len(x), *out.shape), given.own)
    for n, at in _places(len(x), out):
        meetings: list[list[tuple[int, int]]] = []  # per axis: input position, weight
        for axis, i in enumerate(at):
            stride, dilation, (before, _) = layer.stride[axis], layer.dilation[axis], layer.padding[axis]
            meetings.append(
                [
                    (p, k)
                    for k in range(layer.kernel[axis])
                    for p in range(x.shape[2 + axis])
                    if p * stride - before + k * dilation == i
                ]
            )
        pairs = [tuple(zip(*pair, strict=True)) for pair in itertools.product(*meetings)]
        for o in range(layer.out_channels):
            group, inner = divmod(o, group_out)
            channels = range(group * group_in, (group + 1) * group_in)
            terms = [(c, p, k) for c in channels for p, k in pairs]
            xs = [float(x[(n, c, *p)]) for c, p, _ in terms]
            es = [float(error[(n, c, *p)]) for c, p, _ in terms]
            ws = [float(weight[(c, inner, *k)]) for c, _, k in terms]
            neurons.add((n, o, *at), xs, es, ws, thresholds[o])
    return neurons.sums(integers=_whole(layer, given))


def _connected(layer: Linear, given: Given) -> Sums:
    """Every neuron looks at the whole vector."""
    (x,), (error,) = given.values, given.errors
    weight, thresholds = layer.weight.astype(np.float64), _thresholds(layer.bias, layer.out_features)
    neurons = _Neurons((len(x), layer.out_features), given.own)
    for n, o in itertools.product(range(len(x)), range(layer.out_features)):
        neurons.add((n, o), x[n].tolist(), error[n].tolist(), weight[o].tolist(), thresholds[o])
    return neurons.sums(integers=_whole(layer, given))


def _added(given: Given) -> Sums:
    """The sum of the inputs, element by element; of one alone, itself."""
    if len(given.values) == 1:
        value, error = given.values[0], given.errors[0]
        exact = given.is_exact and _integers(value) and bool((np.abs(value) < EXACT_BELOW).all())
        return Sums(value, np.abs(value), error, 0, exact)
    neurons = _Neurons(given.values[0].shape, given.own)
    ones = [1.0] * len(given.values)
    for at in np.ndindex(given.values[0].shape):
        xs, es = [float(x[at]) for x in given.values], [float(e[at]) for e in given.errors]
        neurons.add(at, xs, es, ones)
    return neurons.sums(integers=given.is_exact and all(_integers(x) for x in given.values))


def _laid_out(given: Given) -> Sums:
    """The same values in C order."""
    (x,), (error,) = given.values, given.errors
    flat = (len(x), math.prod(x.shape[1:]))
    return Sums(x.reshape(flat), np.zeros(flat), error.reshape(flat), 0, given.is_exact)


def _largest(layer: MaxPool, given: Given) -> Sums:
    """The largest real value of each window; minus infinity where there is none, NaN where one is."""
    out = layer.output_sample(given.sample)
    reads = _reads(layer, given.sample, out)
    (x,), (error,) = given.values, given.errors
    value, spread = np.zeros((len(x), *out.shape)), np.zeros((len(x), *out.shape))
    for n, at in _places(len(x), out):
        places = list(itertools.product(*(reads[axis][i] for axis, i in enumerate(at))))
        for c in range(out.channels):
            here = [(c, *place) for place in places if None not in place]
            value[(n, c, *at)] = _max([float(x[(n, *place)]) for place in here])
            spread[(n, c, *at)] = max((float(error[(n, *place)]) for place in here), default=0.0)
    return Sums(value, np.zeros_like(value), spread, 0, given.is_exact)


def _largest_of_all(given: Given) -> Sums:
    """The largest value of each channel."""
    (x,), (error,) = given.values, given.errors
    shape = (*x.shape[:2], *(1 for _ in x.shape[2:]))
    value = np.array([_max(channel.ravel().tolist()) for sample in x for channel in sample]).reshape(shape)
    spread = error.max(axis=tuple(range(2, x.ndim)), keepdims=True)
    return Sums(value, np.zeros(shape), spread, 0, given.is_exact)


def _averaged(layer: AvgPool, given: Given) -> Sums:
    """The sum of each window's real values, divided by how many of its positions count."""
    out = layer.output_sample(given.sample)
    windows, sizes = layer.windows(given.sample), given.sample.shape[1:]
    (x,), (error,) = given.values, given.errors
    neurons = _Neurons((len(x), *out.shape), given.own)
    for n, at in _places(len(x), out):
        positions = [window.positions(i) for window, i in zip(windows, at, strict=True)]
        real = [[p for p in axis if 0 <= p < size] for axis, size in zip(positions, sizes, strict=True)]
        padded = [
            [p for p in axis if p < size + window.after]
            for axis, size, window in zip(positions, sizes, windows, strict=True)
        ]
        count = math.prod(len(axis) for axis in (padded if layer.count_include_pad else real))
        places = list(itertools.product(*real))
        for c in range(out.channels):
            xs = [float(x[(n, c, *place)]) for place in places]
            es = [float(error[(n, c, *place)]) for place in places]
            _mean(neurons, (n, c, *at), xs, es, count)
    return neurons.sums(integers=False)


def _averaged_whole(given: Given) -> Sums:
    """The mean of each channel."""
    (x,), (error,) = given.values, given.errors
    neurons = _Neurons((*x.shape[:2], *(1 for _ in x.shape[2:])), given.own)
    for n, c in itertools.product(*(range(size) for size in x.shape[:2])):
        xs, es = x[n, c].ravel().tolist(), error[n, c].ravel().tolist()
        _mean(neurons, (n, c, *(0 for _ in x.shape[2:])), xs, es, len(xs))
    return neurons.sums(integers=False)


def _mean(
    neurons: _Neurons, at: tuple[int, ...], xs: Sequence[float], es: Sequence[float], count: int
) -> None:
    """The sum of the values, exact, then divided: weights 1 / count are no exact numbers."""
    neurons.add(at, xs, es, [1.0] * len(xs))
    for part in (neurons.value, neurons.magnitude, neurons.spread):
        part[at] /= count


def _max(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values, default=-math.inf)


def _places(samples: int, out: SampleShape) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every sample with every position of the feature map."""
    for n, *at in itertools.product(range(samples), *(range(size) for size in out.shape[1:])):
        yield n, tuple(at)


def _reads(
    layer: Conv | LocallyConnected | MaxPool, sample: SampleShape, out: SampleShape
) -> list[list[list[int | None]]]:
    """Per axis and output position the real positions read, one per weight; None where there is none."""
    found: list[list[list[int | None]]] = []
    for window, size, count in zip(layer.windows(sample), sample.shape[1:], out.shape[1:], strict=True):
        found.append(
            [[real_position(p, size, layer.row_mode) for p in window.positions(i)] for i in range(count)]
        )
    return found


def _field(x: Floats, channels: Iterable[int], places: Sequence[tuple[int | None, ...]]) -> list[float]:
    """The values that one neuron looks at, in the order of its weights."""
    return [0.0 if None in place else float(x[(c, *place)]) for c in channels for place in places]


def _thresholds(bias: NDArray[Any] | None, count: int) -> list[float]:
    return [0.0] * count if bias is None else bias.astype(np.float64).tolist()


def _whole(layer: Layer, given: Given) -> bool:
    """Whether weights, thresholds and values are integers, and the values exact."""
    arrays = [*(tensor.array for tensor in layer.tensors), *given.values]
    return given.is_exact and all(_integers(array) for array in arrays)


def _exact_sum(xs: Sequence[float], ws: Sequence[float], threshold: float, *, wide: bool) -> float:
    """sum x w + threshold, rounded once to float64 at the end.

    A product of two numbers of at most 26 binary digits is exact in float64. Numbers with more (`wide`) are
    split into two halves first, and the four products of the halves are summed in its stead.
    """
    products = [x * w for x, w in zip(xs, ws, strict=True)]
    if not all(math.isfinite(product) for product in products) or not math.isfinite(threshold):
        return sum(products) + threshold
    if wide:
        pairs = zip(xs, ws, strict=True)
        products = [a * b for x, w in pairs for a in _halves(x) for b in _halves(w)]
    return math.fsum([*products, threshold])


def _halves(value: float) -> tuple[float, float]:
    """`value` as a sum of two numbers of at most 26 binary digits each."""
    mantissa, exponent = math.frexp(value)
    high = math.ldexp(round(math.ldexp(mantissa, 26)), exponent - 26)
    return high, value - high


def _size(xs: Sequence[float], ws: Sequence[float]) -> float:
    return sum(x * abs(w) for x, w in zip(xs, ws, strict=True))


def _integers(values: NDArray[Any]) -> bool:
    exact = values.astype(np.float64)
    return bool((np.isfinite(exact) & (np.rint(exact) == exact)).all())
