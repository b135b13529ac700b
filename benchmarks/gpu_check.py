"""Whether a feature map is right: against a float64 convolution, within what the service promises.

Given a case, its tensors and what was computed, `error_share` hands on the largest error as a share of the
bound: at most 1 where the promise is kept. The bounds are those of `convservice_backends.reference`,
`tensor_core.tf32_roundoff` and `winograd.error_bound`. A batch is made of a few samples over and over; they
are compared with the reference, and all others with them, bit for bit, which the service promises as well.
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
    """The largest error of the first samples as a share of the promised bound.

    Args:
        arrays: the library.
        given: what was computed.
        algorithm: what computed it: its bound is its own.

    Raises:
        Wrong: the bound is broken, or two equal samples have different maps; says by how much.
    """
    case, dtype, sums = given.case, given.dtype, given.dtype.accumulator
    _demand_equal(len(given.base), given.y)
    x, weight = arrays.double(given.base), arrays.double(given.weight)
    exact = arrays.convolved(case, x, weight)
    magnitude = arrays.convolved(case, abs(x), abs(weight))
    if algorithm == "winograd":
        bound = winograd_bound(case, x, weight)
    elif algorithm == "tensor_core" and dtype.name == "float32":
        bound = tf32_roundoff(case.products) * magnitude
    else:
        bound = (case.products + 3) * sums.roundoff * magnitude
    bound = bound + case.products * sums.smallest_normal + dtype.smallest_normal
    bound = bound + dtype.roundoff * abs(exact)
    share = float((abs(arrays.double(given.y[: len(x)]) - exact) / bound).max())
    if not share <= 1:  # a NaN is no share
        raise Wrong(f"an error is {share:.3g} times the bound")
    return share


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
