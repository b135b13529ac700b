"""The emulator as a backend: the CUDA backend of ConvService on emulated devices."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from convservice_backends.cuda.algorithms import wanted_by_environment
from convservice_backends.cuda.backend import MANNER, CudaBackend
from convservice_backends.cuda.device import DeviceInfo
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from convservice_emulator.streams import Policy
from convservice_emulator.work import DONE

RUN_BYTES = 8 << 20
"""Preferred bytes of a run: what stages hold is poisoned in every session, which takes the host's time."""


class EmulatorBackend(CudaBackend):
    """Convolution by the project's CUDA kernels, without a GPU.

    Args:
        workers: devices, over which samples are spread; 1 where not given.
        algorithm: a convolution algorithm to take wherever it fits; the environment's where not given.
        policy: when queued work runs.
        order: in which threads and blocks run; all three in turn where not given.
        info: what each device says that it is.

    Raises:
        BackendUnavailable: there is no C++ compiler, or the environment wants an algorithm that is not there.
    """

    name: ClassVar[str] = "emulator"
    most_multiply_adds: ClassVar[int] = 3_000_000_000
    """What one test may ask of it, some seconds' work: measured, 0.3 (tensor cores) to 2.8 (tiled products)
    thousand million of them take a second."""

    def __init__(
        self,
        workers: int | None = None,
        *,
        algorithm: str | None = None,
        policy: Policy = Policy.OTHERS_FIRST,
        order: int | None = None,
        info: DeviceInfo = INFO,
    ) -> None:
        compiler = Compiler()
        devices = [EmulatedDevice(compiler, info, policy, order) for _ in range(workers or 1)]
        super().__init__(
            devices,
            {"compiler": compiler.version},
            algorithm=algorithm or wanted_by_environment(),
            manner=replace(MANNER, run_bytes=RUN_BYTES),
        )
        self._devices = devices

    @property
    def multiply_adds(self) -> int:
        """All that emulated devices have done in this process."""
        return DONE.total

    def device_peak(self) -> int:
        """Most memory that sessions held at a time on any one device since this was last asked."""
        return max(device.peak() for device in self._devices)
