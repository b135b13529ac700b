"""What of a device's memory is taken: promises, weights that stay, and what makes room for what."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from convservice.errors import Reason, ResourceExhausted
from convservice_backends.cuda.memory import UPLOAD_BYTES, DeviceMemory
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from tests.helpers import Array

KIB = 1 << 10


@pytest.fixture
def device() -> EmulatedDevice:
    return EmulatedDevice(Compiler(), replace(INFO, memory_bytes=100 * KIB))


@pytest.fixture
def memory(device: EmulatedDevice) -> DeviceMemory:
    return DeviceMemory(device)


class Packing:
    """Weights of `kib` KiB, and how often they were packed."""

    def __init__(self, kib: int, fill: int = 1) -> None:
        self.array = np.full(kib * KIB, fill, np.uint8)
        self.times = 0

    def __call__(self) -> tuple[Array]:
        self.times += 1
        return (self.array,)


def test_weights_go_up_once_and_stay(memory: DeviceMemory, device: EmulatedDevice) -> None:
    pack = Packing(10, 7)
    for _ in range(3):
        with memory.weights(("net", 1), pack) as (there,):
            found = np.empty(10 * KIB, np.uint8)
            stream = device.stream()
            stream.download(there, found)
            stream.synchronize()
            assert np.array_equal(found, pack.array)
    assert pack.times == 1
    assert memory.resident == 10 * KIB


def test_weights_larger_than_the_staging_memory_arrive_whole() -> None:
    device = EmulatedDevice(Compiler(), replace(INFO, memory_bytes=4 * UPLOAD_BYTES))
    array = np.arange(UPLOAD_BYTES // 4 * 2 + 5, dtype=np.uint32)
    with DeviceMemory(device).weights(("net",), lambda: (array,)) as (there,):
        found = np.empty(array.nbytes, np.uint8)
        stream = device.stream()
        stream.download(there, found)
        stream.synchronize()
    assert np.array_equal(found.view(np.uint32), array)


def test_the_longest_unused_weights_make_room(memory: DeviceMemory) -> None:
    packs = [Packing(30) for _ in range(4)]
    for key in (0, 1, 2, 0):
        with memory.weights(("net", key), packs[key]):
            pass
    with memory.weights(("net", 3), packs[3]):
        assert memory.resident == 90 * KIB
    for key, times in ((0, 1), (3, 1), (2, 1), (1, 2)):
        with memory.weights(("net", key), packs[key]):
            pass
        assert packs[key].times == times, key


def test_what_cannot_be_had_makes_no_room(memory: DeviceMemory) -> None:
    pack = Packing(30)
    with memory.weights(("net", 0), pack):
        pass
    memory.promise(60 * KIB)
    for nbytes in (41 * KIB, 200 * KIB):
        with pytest.raises(ResourceExhausted):
            memory.promise(nbytes)
    with memory.weights(("net", 0), pack):
        assert pack.times == 1, "weights that nobody uses stay, where their going would not be enough"


def test_weights_that_many_want_at_once_are_packed_once(memory: DeviceMemory) -> None:
    begun, another, pack = threading.Barrier(8), threading.Event(), Packing(10)

    def while_others_want_them() -> tuple[Array]:
        if pack.times:
            another.set()
        packed = pack()
        another.wait(0.1)  # of nobody, if all is well
        return packed

    def want() -> int:
        begun.wait()
        with memory.weights(("net", 0), while_others_want_them) as (there,):
            return there.address

    with ThreadPoolExecutor(8) as pool:
        found = {future.result() for future in [pool.submit(want) for _ in range(8)]}
    assert len(found) == 1
    assert pack.times == 1


def test_a_promise_makes_room_but_not_of_weights_in_use(memory: DeviceMemory) -> None:
    with memory.weights(("net", 0), Packing(30)):
        with memory.weights(("net", 1), Packing(30)):
            pass
        memory.promise(70 * KIB)
        assert memory.resident == 30 * KIB
        with pytest.raises(ResourceExhausted) as caught:
            memory.promise(1)
        assert caught.value.reason == Reason.OUT_OF_DEVICE_MEMORY
        assert caught.value.retry_after is not None
        assert "take 1 bytes of device memory; 0 of 102400 are free" in caught.value.message
        memory.release(70 * KIB)
        memory.promise(1)
        memory.release(1)
    assert memory.promised == 0


def test_what_never_fits_says_so(memory: DeviceMemory) -> None:
    asks: list[Callable[[], None]] = [
        partial(memory.promise, 101 * KIB),
        partial(enter, memory, Packing(101)),
    ]
    for ask in asks:
        with pytest.raises(ResourceExhausted, match="they can never be had here") as caught:
            ask()
        assert caught.value.retry_after is None
    assert (memory.promised, memory.resident) == (0, 0)


def enter(memory: DeviceMemory, pack: Callable[[], tuple[Array]], owner: str = "large") -> None:
    with memory.weights((owner, 1), pack):
        pass


def test_weights_of_a_network_that_is_gone_are_given_back(memory: DeviceMemory) -> None:
    gone, other = object(), object()
    for owner in (gone, other):
        with memory.weights((owner, 1), Packing(10)):
            pass
    memory.forget(gone)
    assert memory.resident == 10 * KIB


def test_a_failed_packing_leaves_nothing(memory: DeviceMemory) -> None:
    def breaks() -> tuple[Array]:
        raise ValueError("cannot be packed")

    with pytest.raises(ValueError, match="cannot be packed"):
        enter(memory, breaks, "net")
    assert memory.resident == 0
    enter(memory, Packing(10), "net")
    assert memory.resident == 10 * KIB
