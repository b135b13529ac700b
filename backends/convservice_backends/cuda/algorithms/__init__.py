"""The algorithms of a convolution, and the choice among them."""

from __future__ import annotations

import os

from convservice.errors import BackendUnavailable, InvalidRequest, Reason
from convservice_backends.cuda.algorithms.base import Algorithm, Case, Problem
from convservice_backends.cuda.algorithms.depthwise import Depthwise
from convservice_backends.cuda.algorithms.direct import Direct
from convservice_backends.cuda.algorithms.fourier import Fourier
from convservice_backends.cuda.algorithms.fourier_tiles import pays
from convservice_backends.cuda.algorithms.implicit_gemm import ImplicitGemm
from convservice_backends.cuda.algorithms.tensor_core import TensorCore
from convservice_backends.cuda.algorithms.winograd import Winograd

ALGORITHMS = (Fourier, Depthwise, TensorCore, Winograd, ImplicitGemm, Direct)
"""In the order in which they are tried: the first that fits computes a layer, `Fourier` where it pays."""

MOST_REACH = 1 << 30
"""Coordinates beyond are for `direct` alone: the other kernels count them with 32 bits."""

NAMES = tuple(algorithm.name for algorithm in ALGORITHMS)

VARIABLE = "CONVSERVICE_CUDA_ALGORITHM"
"""Environment: an algorithm to take wherever it fits."""


def wanted_by_environment() -> str | None:
    """The algorithm that the environment wants, if any.

    Raises:
        BackendUnavailable: there is none of that name.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is not None and wanted not in NAMES:
        raise BackendUnavailable(
            f"{VARIABLE} must be one of {', '.join(NAMES)}, not {wanted!r}", reason=Reason.BACKEND_UNAVAILABLE
        )
    return wanted


def choose(case: Case, wanted: str | None = None) -> Algorithm:
    """The algorithm for a layer.

    Args:
        case: the layer in its place.
        wanted: an algorithm to take wherever it fits; the first of `ALGORITHMS` that fits where not given.

    Raises:
        InvalidRequest: `INVALID_PARAMETER` where there is none of that name.
    """
    if wanted is not None and wanted not in NAMES:
        raise InvalidRequest(
            f"there is no algorithm {wanted!r}; known are {', '.join(NAMES)}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": "algorithm", "value": repr(wanted)},
        )
    near = case.reach < MOST_REACH
    fitting = [each for each in ALGORITHMS if each is Direct or (near and each.fits(case))]
    named = [algorithm for algorithm in fitting if algorithm.name == wanted]
    paying = (algorithm for algorithm in fitting if algorithm is not Fourier or pays(case))
    chosen = named[0] if named else next(paying)
    return chosen(case)


__all__ = [
    "ALGORITHMS",
    "NAMES",
    "VARIABLE",
    "Algorithm",
    "Case",
    "Fourier",
    "Problem",
    "choose",
    "wanted_by_environment",
]
