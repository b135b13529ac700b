"""The CuPy backend: convolution on NVIDIA GPUs.

Its constructor finds out, step by step, whether it can work here: CuPy and a driver are there, CuPy
imports, the driver sees a device, a kernel compiles, runs, and gives the worked example's answer. The first
step that fails is the reason that `info` and the log show. All else is `cuda.backend.CudaBackend`.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import convservice
from convservice.errors import BackendUnavailable, ConvServiceError, Reason
from convservice_backends.cuda.algorithms import wanted_by_environment
from convservice_backends.cuda.backend import CudaBackend
from convservice_backends.cupy.cache import KernelCache
from convservice_backends.cupy.device import CupyDevice
from convservice_backends.trial import try_worked_example

log = logging.getLogger(__name__)

MEMORY_VARIABLE = "CONVSERVICE_DEVICE_MEMORY"
"""Environment: bytes that may be taken of each device's memory."""

DRIVER = "libcuda.so.1"
"""The driver's library, on Linux."""

INSTALL = "pip install 'convservice[server,cuda13]' (or cuda12, as the driver demands)"


class CupyBackend(CudaBackend):
    """Convolution on all GPUs of the first one's model.

    Args:
        algorithm: a convolution algorithm to take wherever it fits; the environment's where not given.

    Raises:
        BackendUnavailable: CuPy is not installed, no device answers, or the trial kernel's answer is wrong.
    """

    name: ClassVar[str] = "cupy"

    def __init__(self, algorithm: str | None = None) -> None:
        cupy = imported()
        cache, algorithm, limit = KernelCache(), algorithm or wanted_by_environment(), _memory_limit()
        models = _models(cupy)
        versions = _versions(cupy, cache)  # before a device is touched: what refuses must not keep its memory
        super().__init__(_devices(models, cache, limit), versions, algorithm=algorithm)
        try:
            try_worked_example(self, len(self.contexts))
        except BaseException:
            self.close()
            raise


def imported() -> Any:
    """The module `cupy`; it is large, and is not imported where there is no driver.

    Raises:
        BackendUnavailable: CuPy or the driver is not installed, or CuPy cannot be imported.
    """
    if find_spec("cupy") is None:
        raise _unavailable(f"CuPy is not installed: {INSTALL}")
    try:
        ctypes.CDLL(DRIVER)
    except OSError as exc:
        raise _unavailable(f"there is no NVIDIA driver here ({exc})") from exc
    try:
        import cupy
    except Exception as exc:  # a part that is missing or does not fit shows as any kind of error
        raise _unavailable(f"CuPy cannot be imported ({type(exc).__name__}: {exc}): {INSTALL}") from exc
    return cupy


def _models(cupy: Any) -> list[str]:
    """The models of the visible devices, which can be asked without touching them."""
    runtime = cupy.cuda.runtime
    try:
        count = int(runtime.getDeviceCount())
        names = [runtime.getDeviceProperties(ordinal)["name"] for ordinal in range(count)]
    except runtime.CUDARuntimeError as exc:
        raise _unavailable(f"the CUDA driver does not answer: {exc}") from exc
    if not names:
        raise _unavailable("the CUDA driver sees no device")
    return [str(name.decode()) for name in names]


def _devices(models: Sequence[str], cache: KernelCache, limit: int | None) -> list[CupyDevice]:
    """The devices that answer, of the first such one's model."""
    found, refused = list[CupyDevice](), ""
    for ordinal, model in enumerate(models):
        if found and model != found[0].info.name:
            log.info("CUDA device %d is not used: it is a %s, not a %s", ordinal, model, found[0].info.name)
            continue
        try:
            found.append(CupyDevice(ordinal, cache.path, limit))
        except ConvServiceError as exc:
            refused = exc.message
            log.warning("CUDA device %d is not used: %s", ordinal, refused)
    if not found:
        raise _unavailable(f"no CUDA device answers: {refused}")
    return found


def _versions(cupy: Any, cache: KernelCache) -> dict[str, str]:
    """What bits depend on beside the device's model."""
    runtime = cupy.cuda.runtime
    return {
        "convservice": convservice.__version__,
        "cupy": str(cupy.__version__),
        "cuda_driver": _dotted(int(runtime.driverGetVersion())),
        "nvrtc": cache.compiler_version,
    }


def _dotted(version: int) -> str:
    """CUDA's way to write a version, 13000, as people write it."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _memory_limit() -> int | None:
    text = os.environ.get(MEMORY_VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal() or not int(text):
        raise _unavailable(f"{MEMORY_VARIABLE} must be a number of bytes, not {text!r}")
    return int(text)


def _unavailable(why: str) -> BackendUnavailable:
    return BackendUnavailable(why, reason=Reason.BACKEND_UNAVAILABLE)
