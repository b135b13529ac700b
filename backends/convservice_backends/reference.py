"""What a network should give: the oracle that every backend is checked against. Plain loops, never fast.

Given a layer (or a network) and an input, it hands back for every neuron the exact value, computed product
by product and summed without error (`math.fsum`), how far a correct backend may be from it, and whether the
backend must give that value exactly. It shares geometry and declarations with the backends and no
arithmetic.

The bound. u is the unit roundoff, eta the smallest normal number, of the accumulator (acc) or of the result
(out); K the number of products in a sum; z* the exact sum with its threshold, M = sum |x||w| + |bias|, f the
activation, L its Lipschitz constant, y* = f(z*):

    |z - z*| <= B = (K + 3) u_acc M + K eta_acc
    |y - y*| <= L B + T + u_out |y*| + eta_out

T, the activation's own error, allows its elementary function 4 units in the last place (8 u_acc) and each
operation around it one rounding:

    linear, relu                0
    leaky_relu                  2 u_acc |y*|  (the slope is rounded, then the product)
    sigmoid, tanh, silu         12 u_acc |y*| + eta_acc (1 + |z*|)  (the last where exp leaves its range)
    gelu                        12 u_acc |z*| + eta_acc  (1 + erf cancels where x < 0)

Where the input itself is off by up to e, as within a network, M is taken of |x| + e, and B grows by
sum e |w|.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import FLOAT64, DType, dtype_of
from convservice.geometry import SampleShape, real_position
from convservice.layers import Activation, Conv, Layer
from convservice.network import INPUT, Network

EXACT_BELOW = 2.0**20
"""Sums of integers with sum |x||w| + |bias| below this must be exact on every backend."""

Floats = NDArray[np.float64]

_INTEGER_SAFE = ("linear", "relu")
_LIPSCHITZ = {"linear": 1.0, "relu": 1.0, "sigmoid": 0.25, "tanh": 1.0, "gelu": 1.13, "silu": 1.1}


@dataclass(frozen=True)
class Sums:
    """The weighted sums of one layer, before its activation; arrays of shape (N, channels, *spatial).

    Attributes:
        value: z*, the exact sum with its threshold.
        magnitude: M, the sum of |x||w| and |bias|, with |x| enlarged by the input's error.
        spread: what the input's error adds: the sum of e |w|.
        products: K, products in each sum.
    """

    value: Floats
    magnitude: Floats
    spread: Floats
    products: int


@dataclass(frozen=True)
class Expected:
    """What one feature map should be; arrays of shape (N, channels, *spatial).

    Attributes:
        value: y*, the exact value, not rounded to any dtype but float64.
        error: how far the accumulator may be from it before the one rounding to the result's dtype.
        exact: whether the result must be `rounded(value, dtype)` and nothing else.
        dtype: of the result.
    """

    value: Floats
    error: Floats
    exact: bool
    dtype: DType

    @property
    def bound(self) -> Floats:
        """The largest |y - y*| allowed, for a float dtype."""
        with np.errstate(invalid="ignore"):
            return self.error + self.dtype.roundoff * np.abs(self.value) + self.dtype.smallest_normal

    def wrong(self, actual: NDArray[Any]) -> NDArray[np.bool_]:
        """Where `actual`, of this dtype, breaks the promise; NaN and infinities must be the same here."""
        if self.exact or self.dtype.is_float:
            got = actual.astype(np.float64)
            want = rounded(self.value, self.dtype).astype(np.float64)
            same = (got == want) | (np.isnan(got) & np.isnan(want))
            if self.exact:
                return np.asarray(~same)
            with np.errstate(invalid="ignore"):
                near = np.isfinite(got) & np.isfinite(self.value) & (np.abs(got - self.value) <= self.bound)
            return np.asarray(~(same | near))
        # Rounding and saturation never decrease, so the result lies between those of the interval's ends.
        error = np.where(np.isfinite(self.error), self.error, 0.0)
        low, high = rounded(self.value - error, self.dtype), rounded(self.value + error, self.dtype)
        return (actual < low) | (actual > high)


def rounded(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """`values` (float64) rounded once to `dtype`: half to even, integers saturated, NaN to an integer 0."""
    exact = np.asarray(values, dtype=np.float64)
    if not dtype.is_float:
        info = np.iinfo(dtype.numpy)
        return np.clip(np.rint(np.nan_to_num(exact, nan=0.0)), info.min, info.max).astype(dtype.numpy)
    if dtype == FLOAT64:
        return exact.copy()
    digits = 1 - math.frexp(dtype.roundoff)[1]  # the roundoff is 2**-digits
    _, exponent = np.frexp(exact)
    lowest = math.frexp(dtype.smallest_normal)[1]  # subnormal numbers share the spacing of the lowest normal
    quantum = np.ldexp(1.0, np.maximum(exponent, lowest) - digits)
    with np.errstate(over="ignore"):
        return np.asarray((np.rint(exact / quantum) * quantum).astype(dtype.numpy))


def layer_reference(
    layer: Layer,
    x: NDArray[Any],
    own: DType,
    out: DType,
    *,
    x_error: Floats | None = None,
) -> Expected:
    """What `layer` should give for `x`, shape (N, channels, *spatial).

    Args:
        layer: the layer.
        x: its input as it received it, of any dtype of the service.
        own: the network's dtype, which fixes the accumulator.
        out: the dtype of the result.
        x_error: how far `x` is from what the backend had; zero when not given.
    """
    given = x.astype(np.float64)
    error = np.zeros_like(given) if x_error is None else x_error
    if isinstance(layer, Conv):
        sums, activation = _convolved(layer, given, error, own), layer.activation
        whole = all(_integers(tensor.array) for tensor in layer.tensors)
    elif isinstance(layer, Activation):
        sums, activation, whole = Sums(given, np.abs(given), error, 0), layer, True
    else:
        raise TypeError(f"the reference has no rule for a {type(layer).__name__}")
    value = np.array([activate(activation, z) for z in sums.value.flat], dtype=np.float64)
    value = value.reshape(sums.value.shape)
    exact = (
        whole
        and _integers(given)
        and not error.any()
        and activation.function in _INTEGER_SAFE
        and bool((sums.magnitude < EXACT_BELOW).all())
    )
    return Expected(value, bound(activation, sums, value, own.accumulator), exact, out)


def network_reference(
    network: Network, x: NDArray[Any], out_dtype: DType | None = None
) -> dict[str, Expected]:
    """What a whole network should give for `x`, shape (N, channels, *spatial): by output name.

    The maps between layers stay exact here; what a backend's rounding of them may do is carried along as
    their error.
    """
    own = network.dtype(dtype_of(x.dtype))
    maps: dict[str, Expected] = {}
    for node in network.nodes:
        source = node.inputs[0]
        if source == INPUT:
            maps[node.id] = layer_reference(node.layer, x, own, own)
            continue
        before = maps[source]
        whole = before.exact and bool((rounded(before.value, own).astype(np.float64) == before.value).all())
        error = np.zeros_like(before.value) if whole else before.bound
        maps[node.id] = layer_reference(node.layer, before.value, own, own, x_error=error)
    out = own if out_dtype is None else out_dtype
    found = {name: maps[node] for name, node in network.outputs.items()}
    return {name: Expected(last.value, last.error, last.exact, out) for name, last in found.items()}


def bound(activation: Activation, sums: Sums, value: Floats, accumulator: DType) -> Floats:
    """L B + T of this module's docstring: how far the accumulator may be from y* after the activation."""
    u, eta = accumulator.roundoff, accumulator.smallest_normal
    with np.errstate(invalid="ignore", over="ignore"):
        before = sums.spread + sums.products * eta
        if sums.products:
            before = before + (sums.products + 3) * u * sums.magnitude
        if activation.function == "leaky_relu":
            return max(1.0, abs(activation.negative_slope)) * before + 2 * u * np.abs(value)
        after = _LIPSCHITZ[activation.function] * before
        if activation.function == "gelu":
            return after + 12 * u * np.abs(sums.value) + eta
        if activation.function in ("sigmoid", "tanh", "silu"):
            return after + 12 * u * np.abs(value) + eta * (1 + np.abs(sums.value))
        return after


def activate(activation: Activation, z: float) -> float:
    """The activation of one exact sum."""
    if math.isnan(z):
        return z
    match activation.function:
        case "relu":
            return max(z, 0.0)
        case "leaky_relu":
            return z if z > 0 else activation.negative_slope * z
        case "sigmoid":
            return _sigmoid(z)
        case "tanh":
            return math.tanh(z)
        case "gelu":
            return z * (math.erfc(-z / math.sqrt(2)) / 2)  # 1 + erf(t) = erfc(-t), without the cancellation
        case "silu":
            return z * _sigmoid(z)
        case _:
            return z


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _convolved(layer: Conv, x: Floats, error: Floats, own: DType) -> Sums:
    """Every sum of a convolution: for each sample and position, for each filter, product by product."""
    sample = SampleShape(x.shape[1], x.shape[2], x.shape[3:])
    out = layer.output_sample(sample)
    reads = _reads(layer, sample, (out.height, *out.rest))
    weight = layer.weight.astype(np.float64)
    filters_per_group, channels_per_group = layer.out_channels // layer.groups, weight.shape[1]
    filters = weight.reshape(layer.out_channels, -1).tolist()
    thresholds = [0.0] * layer.out_channels if layer.bias is None else layer.bias.astype(np.float64).tolist()

    shape = (x.shape[0], out.channels, out.height, *out.rest)
    value, magnitude, spread = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for n in range(shape[0]):
        for at in itertools.product(*(range(size) for size in shape[2:])):
            axes = [reads[axis][i] for axis, i in enumerate(at)]
            places: list[tuple[int | None, ...]] = list(itertools.product(*axes))
            for group in range(layer.groups):
                channels = range(group * channels_per_group, (group + 1) * channels_per_group)
                xs, es = _field(x[n], channels, places), _field(error[n], channels, places)
                sizes = [abs(a) + e for a, e in zip(xs, es, strict=True)]
                for o in range(group * filters_per_group, (group + 1) * filters_per_group):
                    here = (n, o, *at)
                    value[here] = _exact_sum(xs, filters[o], thresholds[o], wide=own == FLOAT64)
                    magnitude[here] = _size(sizes, filters[o]) + abs(thresholds[o])
                    spread[here] = _size(es, filters[o])
    return Sums(value, magnitude, spread, len(filters[0]))


def _reads(layer: Conv, sample: SampleShape, output_sizes: Sequence[int]) -> list[list[list[int | None]]]:
    """Per axis and output position the real positions read, one per weight; None reads the value 0."""
    found: list[list[list[int | None]]] = []
    sizes = (sample.height, *sample.rest)
    for window, size, count in zip(layer.windows(sample), sizes, output_sizes, strict=True):
        found.append(
            [[real_position(p, size, layer.padding_mode) for p in window.positions(i)] for i in range(count)]
        )
    return found


def _field(x: Floats, channels: Iterable[int], places: Sequence[tuple[int | None, ...]]) -> list[float]:
    """The values that one neuron looks at, in the order of its weights."""
    return [0.0 if None in place else float(x[c, *place]) for c in channels for place in places]


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
