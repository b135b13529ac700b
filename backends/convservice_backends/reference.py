"""What a network should give: the oracle that every backend is checked against. Plain loops, never fast.

Given a layer (or a network) and an input, it hands back for every neuron the exact value, computed product
by product and summed without error (`reference_sums`), how far a correct backend may be from it, and whether
the backend must give that value exactly. It shares geometry and declarations with the backends and no
arithmetic.

The bound. u is the unit roundoff, eta the smallest normal number, of the accumulator (acc) or of the result
(out); K the number of products in a sum; z* the exact sum with its threshold, M = sum |x||w| + |bias|, f the
activation, L its Lipschitz constant, y* = f(z*). A mean is a sum with weights 1 / count, a sum of feature
maps one with weights 1; a maximum, and what is only laid out anew, has no sum and no error: K = M = 0.

    |z - z*| <= B = (K + 3) u_acc M + K eta_acc
    |y - y*| <= L B + T + u_out |y*| + eta_out

T, the activation's own error, allows its elementary function 4 units in the last place (8 u_acc) and each
operation around it one rounding:

    linear, relu                0
    leaky_relu                  2 u_acc |y*|  (the slope is rounded, then the product)
    sigmoid, tanh, silu         12 u_acc |y*| + eta_acc (1 + |z*|)  (the last where exp leaves its range)
    gelu                        12 u_acc |z*| + eta_acc  (1 + erf cancels where x < 0)

Where the input itself is off by up to e, as within a network, M is taken of |x| + e, and B grows by
sum e |w|, or for a maximum by the largest e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import FLOAT64, DType, dtype_of
from convservice.layers import Activation, Layer
from convservice.network import INPUT, Network
from convservice_backends.reference_sums import Floats, Given, Sums, sums_of

LINEAR = Activation()

_INTEGER_SAFE = ("linear", "relu")
_LIPSCHITZ = {"linear": 1.0, "relu": 1.0, "sigmoid": 0.25, "tanh": 1.0, "gelu": 1.13, "silu": 1.1}


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
    x: NDArray[Any] | Sequence[NDArray[Any]],
    own: DType,
    out: DType,
    *,
    x_error: Floats | Sequence[Floats] | None = None,
) -> Expected:
    """What `layer` should give for `x`, shape (N, channels, *spatial).

    Args:
        layer: the layer.
        x: its input as it received it, of any dtype of the service; a sequence where it has several.
        own: the network's dtype, which fixes the accumulator.
        out: the dtype of the result.
        x_error: how far `x` is from what the backend had; zero when not given.
    """
    inputs = (x,) if isinstance(x, np.ndarray) else tuple(x)
    values = tuple(array.astype(np.float64) for array in inputs)
    if x_error is None:
        errors = tuple(np.zeros_like(value) for value in values)
    else:
        errors = (x_error,) if isinstance(x_error, np.ndarray) else tuple(x_error)
    sums = sums_of(layer, Given(values, errors, own))
    activation = layer if isinstance(layer, Activation) else getattr(layer, "activation", LINEAR)
    value = np.array([activate(activation, z) for z in sums.value.flat], dtype=np.float64)
    value = value.reshape(sums.value.shape)
    exact = sums.exact and activation.function in _INTEGER_SAFE
    return Expected(value, bound(activation, sums, value, own.accumulator), exact, out)


def network_reference(
    network: Network, x: NDArray[Any], out_dtype: DType | None = None
) -> dict[str, Expected]:
    """What a whole network should give for `x`, shape (N, channels, *spatial): by output name.

    The maps between layers stay exact here; what a backend's rounding of them may do is carried along as
    their error.
    """
    own = network.dtype(dtype_of(x.dtype))
    values: dict[str, NDArray[Any]] = {INPUT: x}
    errors: dict[str, Floats] = {INPUT: np.zeros(x.shape)}
    found: dict[str, Expected] = {}
    for node in network.nodes:
        given = [values[source] for source in node.inputs]
        known = layer_reference(node.layer, given, own, own, x_error=[errors[name] for name in node.inputs])
        whole = known.exact and np.array_equal(
            rounded(known.value, own).astype(np.float64), known.value, equal_nan=True
        )
        found[node.id], values[node.id] = known, known.value
        errors[node.id] = np.zeros_like(known.value) if whole else known.bound
    out = own if out_dtype is None else out_dtype
    ends = {name: found[node] for name, node in network.outputs.items()}
    return {name: Expected(end.value, end.error, end.exact, out) for name, end in ends.items()}


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
