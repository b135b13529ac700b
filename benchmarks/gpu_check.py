"""Whether a feature map is right: against a float64 convolution, within what the service promises.

Given a case, its tensors and what was computed, `error_share` hands on the largest error as a share of the
bound, and `demand_bounded` demands that it is at most 1: the promise is kept. The bounds are those of
`convservice_backends.reference`, `tensor_core.tf32_roundoff` and `winograd.error_bound`. A batch is made of a
few samples over and over; they are compared with the reference, and all others with them, bit for bit, which
the service promises as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_arrays import Arrays
from benchmarks.gpu_cases import ConvCase
from convservice.dtypes import DType
from convservice_backends.cuda.algorithms.tensor_core import tf32_roundoff

BASE_SAMPLES = 5
"""Distinct samples of a batch: a prime, so that a sample read in place of a neighbour shows."""


class Wrong(Exception):
    """A feature map breaks the promise."""


@dataclass(frozen=True)
class Computed:
    """What was computed, and from what.

    Attributes:
        case: the case.
        dtype: of all three tensors.
        base: the distinct samples (at most `BASE_SAMPLES`) that the batch is made of.
        weight: the filter bank.
        y: the whole feature map.
    """

    case: ConvCase
    dtype: DType
    base: Any
    weight: Any
    y: Any


def error_share(arrays: Arrays, given: Computed, algorithm: str) -> float:
    """The largest error of the first samples as a share of the promised bound; NaN where an element is NaN.

    Args:
        arrays: the library.
        given: what was computed.
        algorithm: whose bound is asked for.
    """
    case, dtype = given.case, given.dtype
    x, weight = arrays.double(given.base), arrays.double(given.weight)
    exact = arrays.convolved(case, x, weight)
    magnitude = arrays.convolved(case, abs(x), abs(weight))
    bound = sum_bound(case, dtype, algorithm, (x, weight), (exact, magnitude))
    bound = bound + dtype.roundoff * abs(exact) + dtype.smallest_normal
    return float((abs(arrays.double(given.y[: len(x)]) - exact) / bound).max())


def demand_bounded(arrays: Arrays, given: Computed, algorithm: str) -> float:
    """`error_share`, once it is known to be at most 1, and equal samples to have equal maps.

    Raises:
        Wrong: one of both does not hold; says by how much.
    """
    _demand_equal(len(given.base), given.y)
    return within(error_share(arrays, given, algorithm))


def within(share: float) -> float:
    """An error as a share of its bound, if it is at most 1.

    Raises:
        Wrong: it is more, or no number.
    """
    if not share <= 1:
        raise Wrong(f"an error is {share:.3g} times the bound")
    return share


def sum_bound(
    case: ConvCase, given: DType, algorithm: str, tensors: tuple[Any, Any], added: tuple[Any, Any]
) -> Any:
    """How far an algorithm's sums, thresholds added, may be from the exact ones before they are rounded.

    Args:
        case: the convolution.
        given: dtype of rows and filters.
        algorithm: by name.
        tensors: input and filters, in float64 or wider.
        added: the exact sums with their thresholds; sum |x||w| with the threshold's magnitude.
    """
    (exact, magnitude), sums = added, given.accumulator
    if algorithm == "winograd":  # its own bound is of the sum without its threshold
        bound = winograd_bound(case, *tensors) * (1 + sums.roundoff) + sums.roundoff * abs(exact)
    elif algorithm == "tensor_core" and given.name == "float32":
        bound = tf32_roundoff(case.products) * magnitude
    else:
        bound = (case.products + 3) * sums.roundoff * magnitude
    return bound + case.products * sums.smallest_normal


def demand_exact(arrays: Arrays, given: Computed) -> None:
    """Demands, of integer-valued tensors, the exact value rounded once.

    Raises:
        Wrong: an element differs.
    """
    _demand_equal(len(given.base), given.y)
    x, weight = arrays.double(given.base), arrays.double(given.weight)
    exact = arrays.rounded(arrays.convolved(given.case, x, weight), given.dtype)
    differ = exact != arrays.double(given.y[: len(x)])
    if bool(differ.any()):
        raise Wrong(f"{int(differ.sum())} of {math.prod(exact.shape)} sums of integers are not exact")


def winograd_bound(case: ConvCase, x: Any, weight: Any) -> Any:
    """`winograd.error_bound`, with the largest input of all where it has the largest of a tile: looser."""
    from convservice_backends.cuda.algorithms.winograd import error_bound

    norms = abs(weight).reshape(case.weight[0], -1).sum(1).reshape(1, -1, 1, 1)
    largest: Any = float(abs(x).max())
    found: Any = error_bound(case.weight[1], largest, norms)
    return found


def _demand_equal(count: int, y: Any) -> None:
    """Demands that samples that were given the same input have the same map."""
    for first in range(count, len(y), count):
        part = y[first : first + count]
        if not bool((part == y[: len(part)]).all()):
            raise Wrong(f"of samples {first} to {first + len(part) - 1} some differ from equal samples")
