"""What of a device's memory is taken: by running tensors, and by weights that wait for the next ones.

`DeviceMemory` counts the bytes that running tensors were promised, and keeps packed weights on the device
between tensors; what no running tensor uses is given back, the longest unused first, when room is wanted.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from convservice.errors import Reason, ResourceExhausted
from convservice_backends.cuda.device import Device, Memory, Stream

RETRY_AFTER = 1.0
"""Seconds after which a tensor that would fit an idle device may be sent again."""

UPLOAD_BYTES = 8 << 20
"""Page-locked memory through which weights go up."""


Key = tuple[object, ...]
"""Whose weights, of what node, for what algorithm."""


@dataclass
class _Kept:
    """One layer's weights on the device."""

    memories: tuple[Memory, ...]
    nbytes: int
    users: int = 0


class DeviceMemory:
    """One device's memory, shared by all sessions.

    Args:
        device: the device; its `memory_bytes` is what may be taken in all.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._limit = device.info.memory_bytes
        self._uploading = threading.Lock()  # guards _stream, and what is under way on it
        self._stream: Stream | None = None
        # Guards what follows. The garbage collector may end a session's hold on weights in a thread that has
        # it.
        self._lock = threading.RLock()
        self._promised = 0
        self._resident = 0
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._coming: WeakValueDictionary[Key, threading.Lock] = WeakValueDictionary()
        self._forgotten: deque[object] = deque()

    @property
    def promised(self) -> int:
        """Bytes promised to running tensors."""
        with self._lock:
            return self._promised

    @property
    def resident(self) -> int:
        """Bytes of weights on the device, or on their way there."""
        with self._lock:
            self._drop_forgotten()
            return self._resident

    def promise(self, nbytes: int) -> None:
        """Promises bytes to a tensor, weights that nobody uses making room; `release` gives them back.

        Raises:
            ResourceExhausted: `OUT_OF_DEVICE_MEMORY`; with `retry_after` if an idle device could take them.
        """
        with self._lock:
            self._make_room(nbytes, "a tensor's rows and working memory")
            self._promised += nbytes

    def release(self, nbytes: int) -> None:
        """Gives promised bytes back."""
        with self._lock:
            self._promised -= nbytes

    @contextmanager
    def weights(
        self, key: Key, pack: Callable[[], Sequence[NDArray[np.generic]]], *, beside: int = 0
    ) -> Generator[tuple[Memory, ...]]:
        """One layer's weights, on the device as long as the context lasts, and after it while there is room.

        Args:
            key: whose weights, for what algorithm.
            pack: the arrays, as kernels read them; called where they are not on the device.
            beside: bytes that are promised to the same tensor, so that both must fit.

        Raises:
            ResourceExhausted: `OUT_OF_DEVICE_MEMORY`.
        """
        kept = self._use(key)
        if kept is None:
            with self._lock:
                turn = self._coming.setdefault(key, threading.Lock())
            with turn:  # several tensors that want the same weights: the first brings them, once
                kept = self._use(key) or self._bring(key, pack(), beside)
        try:
            yield kept.memories
        finally:
            with self._lock:
                kept.users -= 1

    def close(self) -> None:
        """Gives all weights back; no session may be open."""
        with self._lock:
            self._kept.clear()
            self._resident = 0
        with self._uploading:
            self._stream = None

    def forget(self, owner: object) -> None:
        """Says that the weights whose key begins with `owner` are wanted no more; they go when memory is next
        asked for. Takes no lock: the garbage collector calls it at any moment."""
        self._forgotten.append(owner)

    def _use(self, key: Key) -> _Kept | None:
        """What is kept under a key, with one more user."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                kept.users += 1
            return kept

    def _bring(self, key: Key, arrays: Sequence[NDArray[np.generic]], beside: int) -> _Kept:
        """Uploads weights and keeps them, with their first user; holds up only who uploads as well."""
        total = sum(array.nbytes for array in arrays)
        with self._lock:
            self._make_room(total, "a layer's weights", beside)
            self._resident += total
        try:
            kept = _Kept(self._upload(arrays), total, users=1)
        except BaseException:
            with self._lock:
                self._resident -= total
            raise
        with self._lock:
            self._kept[key] = kept
        return kept

    def _make_room(self, nbytes: int, what: str, beside: int = 0) -> None:
        """Drops weights that are unused until `nbytes` are free, none if that cannot be; called with the lock
        held."""
        self._drop_forgotten()
        unused = [key for key, kept in self._kept.items() if not kept.users]
        free = self._limit - self._promised - self._resident
        most = free + sum(self._kept[key].nbytes for key in unused)
        if nbytes > most:
            fits = nbytes + beside <= self._limit
            raise ResourceExhausted(
                f"{what} take {nbytes} bytes of device memory; {max(most, 0)} of {self._limit} are free"
                + ("" if fits else ", so they can never be had here"),
                reason=Reason.OUT_OF_DEVICE_MEMORY,
                metadata={"bytes": str(nbytes), "free": str(max(most, 0)), "budget": str(self._limit)},
                retry_after=RETRY_AFTER if fits else None,
            )
        for key in unused:
            if self._promised + self._resident + nbytes <= self._limit:
                return
            self._drop(key)

    def _drop_forgotten(self) -> None:
        """Drops the weights of owners that are gone: nobody can be using them."""
        while self._forgotten:
            owner = self._forgotten.popleft()
            for key in [key for key in self._kept if key[0] is owner]:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        self._resident -= self._kept.pop(key).nbytes

    def _upload(self, arrays: Sequence[NDArray[np.generic]]) -> tuple[Memory, ...]:
        """Copies arrays to the device; they are there when it returns."""
        memories: list[Memory] = []
        with self._uploading:
            if self._stream is None:
                self._stream = self._device.stream()
            for array in arrays:
                memory = self._device.allocate(max(1, array.nbytes))
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                staging = self._device.pinned(max(1, min(data.nbytes, UPLOAD_BYTES)))
                for first in range(0, data.nbytes, UPLOAD_BYTES):
                    part = data[first : first + UPLOAD_BYTES]
                    staging[: part.nbytes] = part
                    self._stream.upload(staging[: part.nbytes], memory, first)
                    self._stream.synchronize()
                memories.append(memory)
        return tuple(memories)
