"""What the CuPy backend calls of CuPy, on the processor: enough to run that backend where there is no GPU.

Memory is the host's, work is done at once, and a loaded module runs the kernel that its path stands for as
the emulator compiles it. Names and arguments are CuPy's; `test_cupy.py` checks them against CuPy itself.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from convservice_backends.cuda.source import Kernel
from convservice_emulator.build import Compiler


class CUDARuntimeError(RuntimeError):
    """As CuPy's: its text begins with the error's name, its status is the error's number."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class CUDADriverError(CUDARuntimeError):
    """As CuPy's, where it is not the runtime's."""


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class CuFFTError(RuntimeError):
    """As CuPy's: its text is the error's name."""


class Entered:
    """What can be made the current one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class Device(Entered):
    def __init__(self, ordinal: int) -> None:
        self.id = ordinal


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.recorded = False

    @property
    def done(self) -> bool:
        return self.recorded

    def record(self, stream: Stream) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


class Stream(Entered):
    def __init__(self, *, non_blocking: bool = False) -> None:
        assert non_blocking, "work must not wait for the default stream"
        self.ptr = id(self)

    def wait_event(self, event: Event) -> None:
        assert event.recorded

    def synchronize(self) -> None:
        pass


class Pointer:
    def __init__(self, nbytes: int) -> None:
        whole = np.full(nbytes + 256, 0xFF, np.uint8)
        self.data = whole[-whole.ctypes.data % 256 :]
        self.ptr = int(self.data.ctypes.data)

    def __add__(self, offset: int) -> NDArray[np.uint8]:
        assert offset % 16 == 0
        return self.data[offset:]


class MemoryPool:
    """As CuPy's: what is given back is kept for the next of the same size, counts, and does not give way by
    itself to what the limit has no more room for."""

    def __init__(self) -> None:
        self.limit = 0
        self._total = 0
        self._free: deque[int] = deque()

    def set_limit(self, size: int) -> None:
        assert size > 0, "0 is no limit"
        self.limit = size

    def total_bytes(self) -> int:
        return self._total

    def malloc(self, size: int) -> Pointer:
        if size in self._free:
            self._free.remove(size)
        elif self._total + size > self.limit:
            raise OutOfMemoryError(
                f"Out of memory allocating {size} bytes (limit set to: {self.limit} bytes)."
            )
        else:
            self._total += size
        pointer = Pointer(size)
        weakref.finalize(pointer, self._free.append, size).atexit = False
        return pointer

    def free_all_blocks(self) -> None:
        while self._free:
            self._total -= self._free.popleft()


def view(address: int, nbytes: int) -> NDArray[np.uint8]:
    """The bytes at an address."""
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def pinned(nbytes: int) -> NDArray[np.uint8]:
    """Page-locked memory."""
    return np.full(nbytes, 0xFF, np.uint8)


def MemoryPointer(memory: Pointer, offset: int) -> Pointer:  # noqa: N802 - CuPy's name
    assert offset == 0
    return memory


def PinnedMemoryPointer(memory: NDArray[np.uint8], offset: int) -> NDArray[np.uint8]:  # noqa: N802 - CuPy's name
    assert offset == 0
    return memory


class FakeCupy:
    """The module, and the cache that its backend loads kernels from.

    Attributes:
        devices: names of the devices.
        processors: multiprocessors of each.
        on_launch: told of each kernel.
        before_launch: called before each kernel; raises what a broken device would.
    """

    __version__ = "14.2.0"
    compiler_version = "13.0"

    def __init__(self, folder: Path) -> None:
        self.devices = ["fake"]
        self.works = True
        self.processors = 4
        self.on_launch: Callable[[Kernel], None] = lambda kernel: None
        self.before_launch: Callable[[], None] = lambda: None
        self.after_launch: Callable[[], None] = lambda: None
        self._folder = folder
        self._kernels: dict[str, Kernel] = {}
        self._compiler = Compiler()
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: len(self.devices),
            getDeviceProperties=self._properties,
            memGetInfo=lambda: (1 << 30, 2 << 30),
            driverGetVersion=lambda: 13000,
            deviceSynchronize=self._synchronize,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            memcpyAsync=self._copy,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError, Memory=Pointer),
            MemoryPointer=MemoryPointer,
            pinned_memory=SimpleNamespace(PinnedMemory=pinned, PinnedMemoryPointer=PinnedMemoryPointer),
            Device=Device,
            Stream=Stream,
            Event=Event,
            MemoryPool=MemoryPool,
            alloc_pinned_memory=pinned,
            using_allocator=self._using_allocator,
            cufft=SimpleNamespace(
                CuFFTError=CuFFTError,
                CUFFT_D2Z=106,
                CUFFT_Z2D=108,
                CUFFT_FORWARD=-1,
                CUFFT_INVERSE=1,
                PlanNd=partial(PlanNd, self),
            ),
        )
        self.allocator: Callable[[int], Pointer] | None = None
        self.plans = 0

    def path(self, kernel: Kernel, architecture: int) -> Path:
        """As `KernelCache.path`."""
        assert architecture == 90
        path = self._folder / f"{kernel.name}-{kernel.digest[:8]}.cubin"
        self._kernels[str(path)] = kernel
        return path

    def RawModule(self, *, path: str) -> SimpleNamespace:  # noqa: N802 - CuPy's name
        return SimpleNamespace(get_function=partial(Function, self, self._kernels[path]))

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], arguments: bytes, dynamic: int) -> None:
        self.before_launch()
        self.on_launch(kernel)
        self._compiler.library(kernel).launch(arguments, grid, dynamic, 0, 0)
        self.after_launch()

    @staticmethod
    def ndarray(shape: tuple[int, ...], dtype: type[np.generic], memptr: NDArray[np.uint8]) -> NDArray[Any]:
        return memptr[: np.dtype(dtype).itemsize * math.prod(shape)].view(dtype).reshape(shape)

    @contextmanager
    def _using_allocator(self, allocator: Callable[[int], Pointer]) -> Generator[None]:
        self.allocator = allocator
        yield
        self.allocator = None

    def _synchronize(self) -> None:
        if not self.works:
            raise CUDARuntimeError("cudaErrorLaunchFailure: unspecified launch failure", 719)

    def _properties(self, ordinal: int) -> dict[str, Any]:
        name = self.devices[ordinal].encode()
        return {"name": name, "major": 9, "minor": 0, "multiProcessorCount": self.processors}

    @staticmethod
    def _copy(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        assert kind in (1, 2)
        view(target, nbytes)[:] = view(source, nbytes)


class PlanNd:
    """A plan of cuFFT: for arrays of any sizes and strides that it is told, which here must be packed."""

    def __init__(  # noqa: PLR0917 - CuPy's arguments
        self,
        cupy: FakeCupy,
        shape: tuple[int, ...],
        inembed: tuple[int, ...],
        istride: int,
        idist: int,
        onembed: tuple[int, ...],
        ostride: int,
        odist: int,
        fft_type: int,
        batch: int,
        order: str,
        last_axis: int,
        last_size: int,
    ) -> None:
        assert cupy.allocator is not None, "its working memory comes from the device's pool"
        self._working = cupy.allocator(64)
        cupy.plans += 1
        half = (*shape[:-1], shape[-1] // 2 + 1)
        assert (inembed, onembed) == ((shape, half) if fft_type == 106 else (half, shape))
        assert (istride, idist, ostride, odist) == (1, math.prod(inembed), 1, math.prod(onembed))
        assert (order, last_axis, last_size) == ("C", len(shape), onembed[-1])
        self._shape = shape
        self._given = (batch, *inembed)
        self._made = (batch, *onembed)
        self._inverse = fft_type == 108

    def fft(self, a: NDArray[Any], out: NDArray[Any], direction: int) -> None:
        assert direction == (1 if self._inverse else -1)
        axes = tuple(range(1, 1 + len(self._shape)))
        given, made = a.reshape(self._given), out.reshape(self._made)
        if self._inverse:
            made[:] = np.fft.irfftn(given, self._shape, axes, norm="forward")
            given[:] = np.nan
        else:
            made[:] = np.fft.rfftn(given, self._shape, axes)


class Function:
    """A kernel of a loaded module."""

    def __init__(self, cupy: FakeCupy, kernel: Kernel, name: str) -> None:
        assert name == kernel.name
        self._cupy = cupy
        self._kernel = kernel
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: tuple[NDArray[Any]],
        *,
        shared_mem: int,
        stream: Stream,
    ) -> None:
        (arguments,) = args
        assert arguments.size == 1, "CuPy passes arrays of one element by value, and no others"
        assert block == (self._kernel.threads, 1, 1)
        assert shared_mem == self._kernel.dynamic_bytes <= self.max_dynamic_shared_size_bytes
        assert isinstance(stream, Stream)
        self._cupy.launch(self._kernel, grid, arguments.tobytes(), shared_mem)
