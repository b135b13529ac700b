"""The same convolution computed here, to hold a server's answer against.

Plain NumPy in float64, one product per position of the kernel: never fast, and independent of what any
backend does. `check` is given an answer and says how far from exact it is, in units of the bound that the
service promises.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import dtype_of
from convservice.geometry import PaddingMode
from convservice.layers import Conv, split_shape

_NUMPY_MODES: dict[PaddingMode, Literal["constant", "reflect", "edge"]] = {
    PaddingMode.ZEROS: "constant",
    PaddingMode.REFLECT: "reflect",
    PaddingMode.REPLICATE: "edge",
}


@dataclass(frozen=True)
class Check:
    """How an answer compares with what was computed here.

    Attributes:
        equal: whether every element is within the bound.
        largest_error: largest difference.
        share_of_bound: largest difference over its bound; at most 1 when `equal`.
    """

    equal: bool
    largest_error: float
    share_of_bound: float


def convolve(layer: Conv, x: NDArray[Any]) -> NDArray[np.float64]:
    """The layer's sums for x (N, C, *spatial), without bias and activation: (N, out_channels, *out)."""
    return _sums(layer, x.astype(np.float64), layer.weight.astype(np.float64))


def check(layer: Conv, x: NDArray[Any], answer: NDArray[Any]) -> Check:
    """Compares a linear layer's answer for x, both (N, C, *spatial), with the sums computed here.

    The bound of an element is (K + 3) u_acc (|x|*|w|) + u_out |y| + (K + 1) eta, with K the number of
    products in a sum; twice that for float64, where the sums computed here carry errors of their own.
    """
    dtype = dtype_of(answer.dtype)
    accumulator = dtype.accumulator
    terms = int(np.prod(layer.weight.shape[1:]))
    expected = convolve(layer, x)
    magnitude = _sums(layer, np.abs(x.astype(np.float64)), np.abs(layer.weight.astype(np.float64)))
    bound = (terms + 3) * accumulator.roundoff * magnitude + dtype.roundoff * np.abs(expected)
    bound += terms * accumulator.smallest_normal + dtype.smallest_normal
    if dtype.name == "float64":
        bound *= 2
    errors = np.abs(answer.astype(np.float64) - expected)
    share = float(np.max(errors / bound, initial=0.0))
    return Check(share <= 1.0, float(np.max(errors, initial=0.0)), share)


def _sums(layer: Conv, x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    sample = split_shape(x.shape, layer.rank)[1]
    out = layer.output_sample(sample)
    windows = layer.windows(sample)
    around = [(0, 0), (0, 0), *((window.before, window.after) for window in windows)]
    padded: NDArray[np.float64] = np.pad(x, around, mode=_NUMPY_MODES[layer.row_mode])
    sizes = (out.height, *out.rest)
    samples, groups, filters = x.shape[0], layer.groups, layer.out_channels // layer.groups
    weights = weight.reshape(groups, filters, weight.shape[1], -1)
    sums: NDArray[np.float64] = np.zeros((samples, groups, filters, int(np.prod(sizes))))
    for place, at in enumerate(product(*(range(size) for size in layer.kernel))):
        seen = tuple(
            slice(k * window.dilation, k * window.dilation + (size - 1) * window.stride + 1, window.stride)
            for k, window, size in zip(at, windows, sizes, strict=True)
        )
        values = padded[:, :, *seen]
        sums += weights[..., place] @ values.reshape(samples, groups, weight.shape[1], -1)
    return sums.reshape(samples, layer.out_channels, *sizes)
