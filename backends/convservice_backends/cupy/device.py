"""CUDA devices through CuPy: memory, streams, events, loaded kernels.

`CupyDevice` is `cuda.device.Device` for one GPU. Memory comes from a pool of its own, and belongs to the
stream it was allocated on: work on one stream is in order, so that memory given back and taken again there
needs no waiting. Pool and weights together stay within the device's limit. Kernels are compiled cubins from
`cache.KernelCache`, loaded as `RawModule`. An error after which the device answers nothing more is kept as
its `failure`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from convservice.errors import BackendUnavailable, ConvServiceError, InternalError, Reason, ResourceExhausted
from convservice_backends.cuda.device import Bytes, DeviceInfo, Launch, Memory, Transform
from convservice_backends.cuda.source import Kernel
from convservice_backends.cupy.transforms import Plans

LoadCubin = Callable[[Kernel, int], Path]
"""Given a kernel and an architecture, the path of its compiled form."""

STICKY = frozenset({214, 700, 702, 709, 710, *range(714, 720)})
"""Numbers of errors after which no call on the device succeeds until the process ends (CUDA Driver API,
CUresult; the runtime uses the same numbers). After another error the device is asked whether it works."""

OUT_OF_MEMORY = 2
"""The number of `cudaErrorMemoryAllocation` and `CUDA_ERROR_OUT_OF_MEMORY`."""

POOLED_BYTES = 8 << 20
"""Page-locked memory up to this size is kept for the next session; larger goes back to the host."""


class CupyMemory:
    """Memory of one device's pool."""

    def __init__(self, pointer: Any, nbytes: int) -> None:
        self.pointer = pointer  # gives the memory back when it goes
        self.address = int(pointer.ptr)
        self.nbytes = nbytes


class CupyEvent:
    """A place in a stream's work."""

    def __init__(self, device: CupyDevice, event: Any) -> None:
        self._device = device
        self.event = event

    @property
    def done(self) -> bool:
        """Whether the work before it is done."""
        with self._device.guarded():
            return bool(self.event.done)

    def synchronize(self) -> None:
        """Waits."""
        with self._device.guarded():
            self.event.synchronize()


class CupyStream:
    """Work done one after the other; does not wait for the default stream."""

    def __init__(self, device: CupyDevice, cupy: Any) -> None:
        self._device = device
        self._cuda = cupy.cuda
        self.stream = self._cuda.Stream(non_blocking=True)
        self.plans = Plans(cupy)

    def allocate(self, nbytes: int) -> CupyMemory:
        """See `device.Stream`."""
        return self._device.pooled(nbytes, self.stream)

    def launch(self, launch: Launch) -> None:
        """See `device.Stream`."""
        with self._device.guarded():
            function = self._device.function(launch.kernel)
            # CuPy passes an array of one element by value: the structure as one opaque element.
            size = ctypes.sizeof(launch.arguments)
            arguments = np.frombuffer(bytes(launch.arguments), dtype=np.dtype((np.void, size)))
            function(
                launch.grid,
                (launch.kernel.threads, 1, 1),
                (arguments,),
                shared_mem=launch.kernel.dynamic_bytes,
                stream=self.stream,
            )

    def transform(self, transform: Transform) -> None:
        """See `device.Stream`."""
        memory = transform.memory
        if not isinstance(memory, CupyMemory):
            raise TypeError(f"{type(memory).__name__} is not memory of a CUDA device")
        with self._device.guarded(), self.stream, self._device.allocating():
            self.plans.run(transform, memory.pointer)

    def upload(self, source: Bytes, target: Memory, offset: int = 0) -> None:
        """See `device.Stream`."""
        self._copy(target.address + offset, source.ctypes.data, source.nbytes, "memcpyHostToDevice")

    def download(self, source: Memory, target: Bytes) -> None:
        """See `device.Stream`."""
        self._copy(target.ctypes.data, source.address, target.nbytes, "memcpyDeviceToHost")

    def record(self) -> CupyEvent:
        """See `device.Stream`."""
        with self._device.guarded():
            # A waiting thread sleeps: a server has others to run.
            event = self._cuda.Event(block=True, disable_timing=True)
            event.record(self.stream)
            return CupyEvent(self._device, event)

    def wait(self, event: Any) -> None:
        """See `device.Stream`."""
        with self._device.guarded():
            self.stream.wait_event(event.event)

    def synchronize(self) -> None:
        """See `device.Stream`."""
        with self._device.guarded():
            self.stream.synchronize()

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        runtime = self._cuda.runtime
        with self._device.guarded():
            runtime.memcpyAsync(target, source, nbytes, getattr(runtime, kind), self.stream.ptr)


class CupyDevice:
    """One GPU.

    Args:
        ordinal: its number among the visible ones.
        load: compiles kernels, or finds them compiled.
        memory_bytes: what may be taken of its memory; a share of what is free where not given.

    Raises:
        BackendUnavailable: the device does not answer.
    """

    SHARE = 0.9
    """Of the free memory: the rest is for modules, contexts and whoever else uses the device."""

    def __init__(self, ordinal: int, load: LoadCubin, memory_bytes: int | None = None) -> None:
        import cupy

        self._cupy: Any = cupy
        self._load = load
        self._device: Any = self._cupy.cuda.Device(ordinal)
        self._lock = threading.Lock()  # guards what follows
        self._functions: dict[Kernel, Any] = {}
        self._beside: WeakSet[CupyMemory] = WeakSet()  # memory that is not of the pool
        self._plans: WeakSet[Plans] = WeakSet()  # of all streams
        self.failure = ""
        with self.guarded():
            properties = self._cupy.cuda.runtime.getDeviceProperties(ordinal)
            free, _ = self._cupy.cuda.runtime.memGetInfo()
            limit = int(free * self.SHARE) if memory_bytes is None else memory_bytes
            self._pool: Any = self._cupy.cuda.MemoryPool()
            self._pool.set_limit(size=limit)
        self.info = DeviceInfo(
            name=properties["name"].decode(),
            architecture=10 * int(properties["major"]) + int(properties["minor"]),
            processors=int(properties["multiProcessorCount"]),
            memory_bytes=limit,
        )

    def stream(self) -> CupyStream:
        """See `device.Device`."""
        with self.guarded():
            stream = CupyStream(self, self._cupy)
            with self._lock:
                self._plans.add(stream.plans)
            return stream

    def pinned(self, nbytes: int) -> Bytes:
        """See `device.Device`."""
        try:
            with self.guarded():
                cuda = self._cupy.cuda
                if nbytes <= POOLED_BYTES:
                    memory = cuda.alloc_pinned_memory(nbytes)
                else:
                    locked = cuda.pinned_memory.PinnedMemory(nbytes)
                    memory = cuda.pinned_memory.PinnedMemoryPointer(locked, 0)
        except ResourceExhausted as exc:
            raise ResourceExhausted(
                f"the host has no {nbytes} bytes of page-locked memory left",
                reason=Reason.OUT_OF_DEVICE_MEMORY,
                metadata={"bytes": str(nbytes)},
                retry_after=1.0,
            ) from exc
        return np.frombuffer(memory, dtype=np.uint8, count=nbytes)

    def allocate(self, nbytes: int) -> CupyMemory:
        """See `device.Device`. Beside the pool, which cuts what is freed into parts that cannot be put
        together again while one of them is in use: weights would be in the way of large rows."""
        with self.guarded():
            self._limit_pool(beside=nbytes)
            memory = CupyMemory(self._taken(self._unpooled, nbytes, beside=nbytes), nbytes)
            with self._lock:
                self._beside.add(memory)
            return memory

    def pooled(self, nbytes: int, stream: Any) -> CupyMemory:
        """Memory of the pool for work on a stream."""
        with self.guarded(), stream:
            return CupyMemory(self._taken(self._pool.malloc, nbytes), nbytes)

    def allocating(self) -> Any:
        """A context in which what CuPy itself allocates comes from this device's pool."""
        return self._cupy.cuda.using_allocator(partial(self._taken, self._pool.malloc))

    def _unpooled(self, nbytes: int) -> Any:
        """CuPy's pointer to memory of no pool."""
        return self._cupy.cuda.MemoryPointer(self._cupy.cuda.memory.Memory(nbytes), 0)

    def _limit_pool(self, beside: int) -> None:
        """Has the pool take, and keep for later, no more than what is left of the device's limit beside the
        memory that is not of the pool, and `beside` bytes more."""
        with self._lock:
            left = self.info.memory_bytes - beside - sum(memory.nbytes for memory in self._beside)
        self._pool.set_limit(size=max(1, left))  # 0 would be no limit
        if self._pool.total_bytes() > left:
            self._pool.free_all_blocks()

    def _taken(self, take: Callable[[int], Any], nbytes: int, *, beside: int = 0) -> Any:
        """Takes memory; where there is none, once more without what is only kept for later. A pool at its
        limit does not give up the free memory of other streams by itself, and plans keep working memory."""
        cuda = self._cupy.cuda
        try:
            return take(nbytes)
        except (cuda.runtime.CUDARuntimeError, cuda.memory.OutOfMemoryError) as exc:
            if getattr(exc, "status", OUT_OF_MEMORY) != OUT_OF_MEMORY:
                raise
        with self._lock:
            plans = tuple(self._plans)
        for each in plans:
            each.clear()
        self._limit_pool(beside)
        self._pool.free_all_blocks()
        return take(nbytes)

    def function(self, kernel: Kernel) -> Any:
        """A kernel, loaded; the device must be the current one."""
        with self._lock:
            found = self._functions.get(kernel)
        if found is not None:
            return found
        path = self._load(kernel, self.info.architecture)  # compiles: nobody else waits for that
        with self._lock:
            found = self._functions.get(kernel)
            if found is None:
                module = self._cupy.RawModule(path=str(path))
                found = module.get_function(kernel.name)
                if kernel.dynamic_bytes:
                    found.max_dynamic_shared_size_bytes = kernel.dynamic_bytes
                self._functions[kernel] = found
            return found

    def close(self) -> None:
        """See `device.Device`."""
        self._functions.clear()
        if not self.failure:
            with self.guarded():
                self._pool.free_all_blocks()

    @contextmanager
    def guarded(self) -> Generator[None]:
        """Makes the device the thread's current one; CUDA's errors become the project's.

        Raises:
            BackendUnavailable: `DEVICE_LOST`: the device has failed for good, now or before.
            ResourceExhausted: `OUT_OF_DEVICE_MEMORY`.
            InternalError: an error of one call; the device works on.
        """
        if self.failure:
            raise self._lost()
        try:
            with self._device:
                yield
        except ConvServiceError:
            raise
        except self._cupy.cuda.memory.OutOfMemoryError as exc:
            raise _out_of_memory(str(exc)) from exc
        except (self._cupy.cuda.runtime.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError) as exc:
            if exc.status == OUT_OF_MEMORY:
                raise _out_of_memory(str(exc)) from exc
            if exc.status not in STICKY and self._works():
                raise InternalError(f"the device refused a call: {exc}", reason=Reason.INTERNAL) from exc
            self.failure = f"CUDA device {self._device.id} failed for good: {exc}"
            raise self._lost() from exc

    def _works(self) -> bool:
        """Whether the device does what it was asked for until now."""
        try:
            with self._device:
                self._cupy.cuda.runtime.deviceSynchronize()
        except (self._cupy.cuda.runtime.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError):
            return False
        return True

    def _lost(self) -> BackendUnavailable:
        return BackendUnavailable(
            self.failure, reason=Reason.DEVICE_LOST, metadata={"device": str(self._device.id)}
        )


def _out_of_memory(what: str) -> ResourceExhausted:
    return ResourceExhausted(
        f"the device has no memory left for this now: {what}",
        reason=Reason.OUT_OF_DEVICE_MEMORY,
        retry_after=1.0,
    )
