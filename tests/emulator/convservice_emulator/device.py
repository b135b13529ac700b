"""A CUDA device, emulated: see `convservice_backends.cuda.device`, which says what each call means.

`EmulatedDevice` is one device with its memory, its streams and the kernels loaded on it. All its work runs in
the thread that waits for it, one piece at a time. A kernel that a GPU would not survive (a barrier that some
threads never reach, a write beside its memory) makes the device fail for good, as it does there.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from functools import partial
from typing import Any

import numpy as np

from convservice.errors import BackendUnavailable, ConvServiceError, Reason, ResourceExhausted
from convservice_backends.cuda.device import Bytes, DeviceInfo, Launch, Memory, Transform
from convservice_backends.cuda.source import Kernel
from convservice_emulator.build import Compiler, LaunchFailed
from convservice_emulator.memory import POISON, Block, EmulatedMemory
from convservice_emulator.streams import Place, Policy, Queue, Scheduler
from convservice_emulator.work import DONE, multiply_adds

INFO = DeviceInfo(name="emulated", architecture=90, processors=4, memory_bytes=2 << 30)

ORDERS = 3
"""Orders in which threads and blocks may run."""

MOST_POOLED = 2
"""Free blocks that a stream keeps."""

ROUNDED_BYTES = 512
"""A GPU's pool of memory takes a multiple of so many bytes for each allocation."""


class EmulatedEvent:
    """A place in a stream's work."""

    def __init__(self, device: EmulatedDevice, place: Place) -> None:
        self.place = place
        self._device = device

    @property
    def done(self) -> bool:
        """Whether the work before it is done; never waits."""
        with self._device.lock:
            return self.place.passed

    def synchronize(self) -> None:
        """Does the work before it."""
        self._device.pass_place(self.place)


class EmulatedStream:
    """Work done one after the other, when somebody waits for it."""

    def __init__(self, device: EmulatedDevice, queue: Queue) -> None:
        self._device = device
        self._queue = queue
        self._pool: list[Block] = []
        self._freed: deque[Block] = deque()  # the garbage collector adds to it at any moment

    def allocate(self, nbytes: int, *, stays: bool = False) -> EmulatedMemory:
        """Memory, poisoned in this stream's order; what stays is no session's."""
        with self._device.lock:
            self._device.take(nbytes, stays=stays)
            self._collect()
            fitting = (block for block in self._pool if nbytes <= block.nbytes <= 2 * nbytes)
            block = next(fitting, None)
            if block is None:
                block = self._device.new_block(nbytes)
            else:
                self._pool.remove(block)
                self._device.put(self._queue, lambda: block.data.fill(POISON))
            return EmulatedMemory(block, nbytes, self, partial(self._give_back, stays=stays))

    def launch(self, launch: Launch) -> None:
        """Queues a kernel, with its arguments as they are now."""
        # Nothing that is queued may keep `launch`, and with it the memory.
        device, kernel, grid, arguments = self._device, launch.kernel, launch.grid, bytes(launch.arguments)
        blocks = [_block(memory) for memory in launch.holds]
        # Memory of this stream may go to later work on it; that of others not before the kernel has run.
        held = [memory for memory in launch.holds if getattr(memory, "stream", None) is not self]

        def run() -> None:
            held.clear()
            device.run(kernel, arguments, grid, blocks)

        with device.lock:
            device.put(self._queue, run)

    def transform(self, transform: Transform) -> None:
        """Queues transforms."""
        data = _block(transform.memory).data
        with self._device.lock:
            self._device.put(self._queue, lambda: transformed(transform, data))

    def upload(self, source: Bytes, target: Memory, offset: int = 0) -> None:
        """Queues a copy to the device."""
        if not 0 <= offset <= target.nbytes - source.nbytes:
            raise ValueError(f"{source.nbytes} bytes at {offset} do not fit a memory of {target.nbytes}")
        place = _block(target).data[offset : offset + source.nbytes]
        with self._device.lock:
            self._device.put(self._queue, lambda: np.copyto(place, source))

    def download(self, source: Memory, target: Bytes) -> None:
        """Queues a copy to the host."""
        if target.nbytes > source.nbytes:
            raise ValueError(f"{target.nbytes} bytes are not in a memory of {source.nbytes}")
        place = _block(source).data[: target.nbytes]
        with self._device.lock:
            self._device.put(self._queue, lambda: np.copyto(target, place))

    def record(self) -> EmulatedEvent:
        """Marks this place."""
        with self._device.lock:
            return EmulatedEvent(self._device, Place(self._queue, self._queue.asked))

    def wait(self, event: Any) -> None:
        """Queues a wait."""
        with self._device.lock:
            self._device.put(self._queue, event.place)

    def synchronize(self) -> None:
        """Does all its work."""
        self.record().synchronize()

    def _give_back(self, block: Block, nbytes: int, *, stays: bool) -> None:
        self._freed.append(block)
        self._device.freed(nbytes, stays=stays)

    def _collect(self) -> None:
        while self._freed:
            self._pool.append(self._freed.popleft())
        del self._pool[:-MOST_POOLED]


class EmulatedDevice:
    """One device.

    Args:
        compiler: of its kernels.
        info: what it says that it is.
        policy: when queued work runs.
        order: in which threads and blocks run; the three in turn, launch by launch, where not given.
    """

    def __init__(
        self,
        compiler: Compiler,
        info: DeviceInfo = INFO,
        policy: Policy = Policy.OTHERS_FIRST,
        order: int | None = None,
    ) -> None:
        self.info = info
        self.lock = threading.RLock()  # held for every piece of work; guards all below, and all queues
        self._compiler = compiler
        self._scheduler = Scheduler(policy)
        self._order = order
        self._launches = 0
        self._failure = ""
        self._taken = 0
        self._working = self._peak = 0  # of memory that does not stay, as a pool counts it: now, and at most
        self._freed: deque[tuple[int, bool]] = deque()

    @property
    def failure(self) -> str:
        """Why it has failed for good; empty while it works."""
        return self._failure

    @property
    def taken_bytes(self) -> int:
        """Device memory that is held."""
        with self.lock:
            self._count_freed()
            return self._taken

    def peak(self) -> int:
        """Most memory held at a time since this was last asked, without what stays; as a pool counts it."""
        with self.lock:
            self._count_freed()
            peak, self._peak = self._peak, self._working
            return peak

    @property
    def launches(self) -> int:
        """Kernels that have run."""
        with self.lock:
            return self._launches

    @property
    def is_idle(self) -> bool:
        """Whether no stream has anything left to do."""
        with self.lock:
            return self._scheduler.is_idle

    def fail(self, why: str) -> None:
        """Fails for good."""
        self._failure = why

    def stream(self) -> EmulatedStream:
        """A new stream."""
        with self.lock:
            return EmulatedStream(self, self._scheduler.queue())

    def allocate(self, nbytes: int) -> EmulatedMemory:
        """Memory of a stream that nobody else works on."""
        return self.stream().allocate(nbytes, stays=True)

    def pinned(self, nbytes: int) -> Bytes:
        """Memory of the host, poisoned."""
        return np.full(nbytes, POISON, np.uint8)

    def close(self) -> None:
        """Nothing is kept that the garbage collector does not take."""

    def take(self, nbytes: int, *, stays: bool = False) -> None:
        """Counts memory as held.

        Raises:
            ResourceExhausted: `OUT_OF_DEVICE_MEMORY`.
        """
        free = self.info.memory_bytes - self.taken_bytes
        if nbytes > free:
            raise ResourceExhausted(
                f"{nbytes} bytes of device memory are wanted; {free} of {self.info.memory_bytes} are free",
                reason=Reason.OUT_OF_DEVICE_MEMORY,
                metadata={"bytes": str(nbytes), "free": str(free), "budget": str(self.info.memory_bytes)},
            )
        self._taken += nbytes
        if not stays:
            self._working += _rounded_up(nbytes)
            self._peak = max(self._peak, self._working)

    def freed(self, nbytes: int, *, stays: bool = False) -> None:
        """Counts memory as free; the garbage collector calls it at any moment."""
        self._freed.append((nbytes, stays))

    def new_block(self, nbytes: int) -> Block:
        """Bytes that no stream has had before."""
        return Block(nbytes)

    def put(self, queue: Queue, item: Any) -> None:
        """Adds to a stream's work; called with the lock held."""
        self._must_work()
        self._guarded(lambda: self._scheduler.put(queue, item))

    def pass_place(self, place: Place) -> None:
        """Does the work before a place.

        Raises:
            BackendUnavailable: `DEVICE_LOST`: the device has failed for good, now or before.
        """
        with self.lock:
            self._must_work()
            self._guarded(lambda: self._scheduler.pass_place(place))

    def run(self, kernel: Kernel, arguments: bytes, grid: tuple[int, int, int], blocks: list[Block]) -> None:
        """Runs a kernel now."""
        self._launches += 1
        DONE.add(multiply_adds(kernel, arguments))
        order = self._launches % ORDERS if self._order is None else self._order
        library = self._compiler.library(kernel)
        library.launch(arguments, grid, kernel.dynamic_bytes, order, self._launches)
        for block in blocks:
            trespass = block.trespass()
            if trespass:
                raise LaunchFailed(f"kernel {kernel.name}: {trespass}", reason=Reason.INTERNAL)

    def _count_freed(self) -> None:
        while self._freed:
            nbytes, stays = self._freed.popleft()
            self._taken -= nbytes
            self._working -= 0 if stays else _rounded_up(nbytes)

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except LaunchFailed as exc:
            self._failure = f"the emulated device has failed: {exc.message}"
            raise self._lost() from exc

    def _must_work(self) -> None:
        if self._failure:
            raise self._lost()

    def _lost(self) -> ConvServiceError:
        return BackendUnavailable(self._failure, reason=Reason.DEVICE_LOST)


def transformed(transform: Transform, data: Bytes) -> None:
    """Does transforms in the bytes of a memory; the source of a backward one is poisoned.

    One array at a time: a library may compute several together, with other roundings than one alone.
    """
    shapes = (transform.real_shape, transform.spectrum_shape)
    parts = (transform.source, transform.target)
    real_at, spectrum_at = reversed(parts) if transform.inverse else parts
    sizes = [8 * math.prod(shapes[0]), 16 * math.prod(shapes[1])]
    real = data[real_at : real_at + sizes[0]].view(np.float64).reshape(shapes[0])
    spectra = data[spectrum_at : spectrum_at + sizes[1]].view(np.complex128).reshape(shapes[1])
    for one, spectrum in zip(real, spectra, strict=True):
        if transform.inverse:
            one[:] = np.fft.irfft2(spectrum, s=one.shape, norm="forward")
        else:
            spectrum[:] = np.fft.rfft2(one)
    if transform.inverse:
        spectra.view(np.uint8)[:] = POISON


def _rounded_up(nbytes: int) -> int:
    return -(-nbytes // ROUNDED_BYTES) * ROUNDED_BYTES


def _block(memory: Memory) -> Block:
    if not isinstance(memory, EmulatedMemory):
        raise TypeError(f"{type(memory).__name__} is not memory of an emulated device")
    return memory.block
