"""Fourier transforms by cuFFT, through CuPy's plans.

`Plans` are one stream's own: a plan has working memory, which no two streams may use at the same time, and
CuPy keeps its plans by thread, not by stream. They write into the memory that they are given; nothing is
copied.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np

from convservice.errors import BackendUnavailable, InternalError, Reason, ResourceExhausted
from convservice_backends.cuda.device import Transform
from convservice_backends.cupy.compiler import INSTALL

MOST_PLANS = 8
"""Plans that a stream keeps: two for each layer that transforms."""

NO_MEMORY = frozenset({"CUFFT_ALLOC_FAILED", "CUFFT_NO_WORKSPACE"})
"""Errors of cuFFT that say that there is not enough memory."""


class Plans:
    """One stream's plans, the least recently used dropped.

    Args:
        cupy: the module.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._lock = threading.Lock()  # guards _plans: another stream that wants memory may `clear` them
        self._plans: OrderedDict[tuple[object, ...], Any] = OrderedDict()

    def clear(self) -> None:
        """Drops all plans, and with them their working memory; one at work stays until it is done."""
        with self._lock:
            self._plans.clear()

    def run(self, transform: Transform, pointer: Any) -> None:
        """Runs transforms on CuPy's current stream; a new plan's memory comes from the current allocator.

        Args:
            transform: which.
            pointer: CuPy's, to the beginning of the transform's memory.

        Raises:
            BackendUnavailable: cuFFT is not installed.
            ResourceExhausted: `OUT_OF_DEVICE_MEMORY`: there is no memory for a plan.
            InternalError: cuFFT refuses.
        """
        cufft = self._cufft()
        real, spectra = (transform.real_shape, np.float64), (transform.spectrum_shape, np.complex128)
        given, made = (spectra, real) if transform.inverse else (real, spectra)
        source = self._cupy.ndarray(*given, memptr=pointer + transform.source)
        target = self._cupy.ndarray(*made, memptr=pointer + transform.target)
        with _errors_of(cufft):
            plan = self._plan(cufft, transform)
            plan.fft(source, target, cufft.CUFFT_INVERSE if transform.inverse else cufft.CUFFT_FORWARD)

    def _plan(self, cufft: Any, transform: Transform) -> Any:
        """A plan, made now or before; it is then the last used."""
        key = (*transform.real_shape, transform.inverse)
        with self._lock:
            found = self._plans.pop(key, None)
        if found is None:
            found = _new_plan(cufft, transform)
        with self._lock:
            self._plans[key] = found
            while len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        return found

    def _cufft(self) -> Any:
        try:
            return self._cupy.cuda.cufft  # loads the library
        except ImportError as exc:
            why = " ".join(str(exc).split())
            raise BackendUnavailable(
                f"transforms are computed with cuFFT, which cannot be loaded ({why[:200]}): {INSTALL}",
                reason=Reason.BACKEND_UNAVAILABLE,
            ) from exc


def _new_plan(cufft: Any, transform: Transform) -> Any:
    """A plan for packed arrays, one after the other (cuFFT, section "Advanced Data Layout")."""
    first = 2 if transform.rows == 1 else 1
    real: tuple[int, ...] = transform.real_shape[first:]
    spectrum: tuple[int, ...] = transform.spectrum_shape[first:]
    given, made = (spectrum, real) if transform.inverse else (real, spectrum)
    kind = cufft.CUFFT_Z2D if transform.inverse else cufft.CUFFT_D2Z
    inside, outside = (given, 1, math.prod(given)), (made, 1, math.prod(made))  # sizes and both strides
    return cufft.PlanNd(real, *inside, *outside, kind, transform.count, "C", len(real), made[-1])


@contextmanager
def _errors_of(cufft: Any) -> Generator[None]:
    """cuFFT's errors become the project's."""
    try:
        yield
    except cufft.CuFFTError as exc:
        if str(exc) in NO_MEMORY:
            raise ResourceExhausted(
                f"the device has no memory left for a transform now: {exc}",
                reason=Reason.OUT_OF_DEVICE_MEMORY,
                retry_after=1.0,
            ) from exc
        raise InternalError(f"cuFFT refused a call: {exc}", reason=Reason.INTERNAL) from exc
