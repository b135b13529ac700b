"""Compiling for GPUs: NVRTC, NVIDIA's compiler as a library. It needs no driver and no device.

Given a `Kernel` and an architecture, `compile_kernel` hands on the cubin, code for that architecture alone,
with the compiler's log, in which `Compiled.resources` reads what the kernel takes. CuPy could compile too,
but it adds `-ftz=true` to the options, and here denormals are kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from convservice.errors import BackendUnavailable, InternalError, Reason
from convservice_backends.cuda.source import Kernel

INSTALL = "pip install 'convservice[cuda13]' (convservice[cuda12] for a driver of CUDA 12)"

OPTIONS = (
    "--std=c++17",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--fmad=true",
    "--generate-line-info",  # profilers and compute-sanitizer name lines; the code stays the same
    "--ptxas-options=-v",  # the log says what a kernel takes
)
"""Options of every compilation, beside the architecture."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: 32-bit registers of a thread.
        spill_bytes: stores and loads of registers that did not fit, in bytes of a thread.
        stack_bytes: local memory of a thread.
        static_shared_bytes: shared memory of a block, without the dynamic.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        cubin: an ELF image with the kernel under its name.
        log: what the compiler said: warnings, and what the kernel takes.
    """

    cubin: bytes
    log: str

    @property
    def resources(self) -> Resources:
        """What it takes, read from the log.

        Raises:
            InternalError: the log does not say, as one kernel's log by NVRTC 12.9 and 13.0 does.
        """
        return resources_in(self.log)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The log's lines that warn."""
        return tuple(line for line in self.log.splitlines() if re.search(r"\bwarning( #|\s*:)", line))


def compile_kernel(kernel: Kernel, architecture: int) -> Compiled:
    """Compiles one kernel; any number of threads may do so at the same time.

    Args:
        kernel: which.
        architecture: of the device, 10 * major + minor.

    Raises:
        BackendUnavailable: NVRTC is not installed, or does not know the architecture.
        InternalError: the source does not compile (the message has the compiler's log), or the architecture
            lacks the kernel's instructions.
    """
    if architecture < kernel.minimum:
        raise InternalError(
            f"{kernel.name} needs instructions of sm_{kernel.minimum}, the device is sm_{architecture}",
            reason=Reason.INTERNAL,
        )
    nvrtc, target = nvrtc_module(), target_of(architecture)
    program = _checked(nvrtc.nvrtcCreateProgram(kernel.source.encode(), b"kernel.cu", 0, None, None))
    try:
        options = [option.encode() for option in options_for(target)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        log = log.rstrip("\0\n")
        if int(status):
            raise InternalError(
                f"{kernel.name} does not compile for sm_{target}: {log or status.name}",
                reason=Reason.INTERNAL,
            )
        cubin = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, log)


def options_for(target: int) -> tuple[str, ...]:
    """All options of a compilation.

    Args:
        target: an architecture that NVRTC knows.
    """
    return (f"--gpu-architecture=sm_{target}", *OPTIONS)


def compiler_version() -> str:
    """NVRTC's version, such as "13.0".

    Raises:
        BackendUnavailable: NVRTC is not installed.
    """
    nvrtc = nvrtc_module()
    status, major, minor = nvrtc.nvrtcVersion()
    _checked((status,))
    return f"{major}.{minor}"


def target_of(architecture: int) -> int:
    """The architecture to compile for: the device's, or the nearest below of the same major version.

    Code for one architecture runs on those of the same major version that are not below it (CUDA C++
    Programming Guide, section "Binary Compatibility").

    Args:
        architecture: of the device, 10 * major + minor.

    Raises:
        BackendUnavailable: NVRTC is not installed, or knows none that the device runs.
    """
    known = _architectures()
    fitting = [one for one in known if one // 10 == architecture // 10 and one <= architecture]
    if not fitting:
        raise BackendUnavailable(
            f"NVRTC {compiler_version()} compiles for {', '.join(f'sm_{one}' for one in known)};"
            f" the device is sm_{architecture}",
            reason=Reason.BACKEND_UNAVAILABLE,
        )
    return max(fitting)


def resources_in(log: str) -> Resources:
    """What a kernel takes, from a log that speaks of one kernel, with the functions that it calls.

    Raises:
        InternalError: the log does not say.
    """
    frame = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not frame or len(registers) != 1:
        raise InternalError(
            f"the compiler's log must speak of one kernel, it speaks of {len(registers)}: {log}",
            reason=Reason.INTERNAL,
        )
    stack, stores, loads = (sum(map(int, column)) for column in zip(*frame, strict=True))
    shared = re.search(r"(\d+) bytes smem", log)
    return Resources(int(registers[0]), stores + loads, stack, int(shared[1]) if shared else 0)


@cache
def nvrtc_module() -> Any:
    """The module that speaks to NVRTC, with the library loaded.

    Raises:
        BackendUnavailable: NVRTC is not installed.
    """
    try:
        nvrtc = import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError) as exc:  # without the library: DynamicLibNotFoundError, a RuntimeError
        why = " ".join(str(exc).split())
        raise BackendUnavailable(
            f"kernels are compiled with NVRTC, which cannot be loaded ({why[:200]}): {INSTALL}",
            reason=Reason.BACKEND_UNAVAILABLE,
        ) from exc
    return nvrtc


@cache
def _architectures() -> tuple[int, ...]:
    nvrtc = nvrtc_module()
    status, known = nvrtc.nvrtcGetSupportedArchs()
    _checked((status,))
    return tuple(sorted(map(int, known)))


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of a call of NVRTC."""
    status, *values = answer
    if int(status):
        raise InternalError(f"NVRTC refused a call: {status.name}", reason=Reason.INTERNAL)
    return values[0] if values else None


def _text(size: Any, fill: Any, program: Any) -> bytes:
    """What NVRTC writes into memory of a size that it says."""
    buffer = bytearray(_checked(size(program)))
    _checked(fill(program, buffer))
    return bytes(buffer)
