"""The emulated device: work done late and in a bad order, memory that is given out again at once, failure."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from convservice.dtypes import FLOAT32
from convservice.errors import BackendUnavailable, Reason, ResourceExhausted
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import DeviceInfo, Launch
from convservice_backends.cuda.elementwise import copy_launch
from convservice_emulator.build import Compiler
from convservice_emulator.device import EmulatedDevice, EmulatedStream
from convservice_emulator.memory import EmulatedMemory
from convservice_emulator.streams import Place, Policy, Queue, Scheduler

SMALL = DeviceInfo(name="emulated", architecture=90, processors=2, memory_bytes=10_000)
SIZE = 40

Numbers = NDArray[np.float32]


@pytest.fixture(params=Policy, ids=lambda policy: policy.value)
def policy(request: pytest.FixtureRequest) -> Policy:
    """Each policy."""
    found: Policy = request.param
    return found


@pytest.fixture
def device(compiler: Compiler, policy: Policy) -> EmulatedDevice:
    """A small device under each policy."""
    return EmulatedDevice(compiler, SMALL, policy)


def as_bytes(numbers: Numbers) -> NDArray[np.uint8]:
    """The same memory."""
    return numbers.view(np.uint8)


def copying(source: EmulatedMemory, target: EmulatedMemory) -> Launch:
    """A kernel that copies SIZE numbers."""
    shape = (1, 1, SIZE)
    launch = copy_launch(
        DeviceArray.packed(source, shape, FLOAT32), DeviceArray.packed(target, shape, FLOAT32)
    )
    assert launch is not None
    return launch


def fetched(stream: EmulatedStream, memory: EmulatedMemory) -> Numbers:
    """What is in memory, read by a stream."""
    host = np.zeros(SIZE, np.float32)
    stream.download(memory, as_bytes(host))
    stream.synchronize()
    return host


def test_a_copy_up_a_kernel_and_a_copy_down(device: EmulatedDevice) -> None:
    stream = device.stream()
    x = np.arange(SIZE, dtype=np.float32)
    source, target = stream.allocate(x.nbytes), stream.allocate(x.nbytes)
    stream.upload(as_bytes(x), source)
    stream.launch(copying(source, target))
    assert np.array_equal(fetched(stream, target), x)
    assert source.address % 256 == target.address % 256 == 0


def test_memory_is_not_a_number_until_written(device: EmulatedDevice) -> None:
    stream = device.stream()
    assert np.isnan(fetched(stream, stream.allocate(4 * SIZE))).all()
    assert (device.pinned(5) == 255).all()


def through_three_streams(device: EmulatedDevice, *, waits: bool) -> tuple[Numbers, Numbers]:
    """Two arrays sent through one memory by three streams, one after the other; what came down.

    Args:
        device: the device.
        waits: whether each stream waits for the one before, and the first for the last one's earlier work.
    """
    up, compute, down = (device.stream() for _ in range(3))
    sent = [np.full(SIZE, value, np.float32) for value in (1, 2)]
    came = [np.zeros(SIZE, np.float32) for _ in sent]
    source, target = compute.allocate(4 * SIZE), compute.allocate(4 * SIZE)
    if waits:
        up.wait(compute.record())
    for x, result in zip(sent, came, strict=True):
        up.upload(as_bytes(x), source)
        if waits:
            compute.wait(up.record())
        compute.launch(copying(source, target))
        if waits:
            down.wait(compute.record())
        down.download(target, as_bytes(result))
        if waits:
            up.wait(down.record())
            compute.wait(down.record())
    for stream in (down, compute, up):
        stream.synchronize()
    return came[0], came[1]


def test_streams_that_wait_for_each_other_give_the_right_result(device: EmulatedDevice) -> None:
    first, second = through_three_streams(device, waits=True)
    assert (first == 1).all()
    assert (second == 2).all()


@pytest.mark.parametrize("policy", [Policy.LAZY, Policy.OTHERS_FIRST], indirect=True)
def test_streams_that_do_not_wait_give_a_wrong_one(device: EmulatedDevice) -> None:
    first, second = through_three_streams(device, waits=False)
    assert not ((first == 1).all() and (second == 2).all())


def test_an_event_is_done_when_the_work_before_it_is(device: EmulatedDevice, policy: Policy) -> None:
    stream = device.stream()
    memory, x = stream.allocate(4 * SIZE), np.zeros(SIZE, np.float32)
    assert stream.record().done, "there is nothing before it"
    stream.upload(as_bytes(x), memory)
    event = stream.record()
    assert event.done == (policy is Policy.EAGER)
    event.synchronize()
    assert event.done


def test_memory_given_back_goes_to_the_next_on_the_same_stream_at_once(device: EmulatedDevice) -> None:
    stream = device.stream()
    x = np.full(SIZE, 3, np.float32)
    first = stream.allocate(x.nbytes)
    target = stream.allocate(x.nbytes)
    address = first.address
    stream.upload(as_bytes(x), first)
    stream.launch(copying(first, target))
    del first
    second = stream.allocate(x.nbytes)
    assert second.address == address
    assert np.isnan(fetched(stream, second)).all()
    assert np.array_equal(fetched(stream, target), x), "the kernel ran before the memory was used again"


@pytest.mark.parametrize("policy", [Policy.LAZY], indirect=True)
def test_memory_in_use_on_another_stream_is_lost_without_a_wait(device: EmulatedDevice) -> None:
    owner, other = device.stream(), device.stream()
    x = np.full(SIZE, 3, np.float32)
    memory = owner.allocate(x.nbytes)
    other.upload(as_bytes(x), memory)
    del memory
    again = owner.allocate(x.nbytes)
    owner.upload(as_bytes(x + 1), again)
    owner.synchronize()
    other.synchronize()
    assert (fetched(owner, again) == 3).all(), "the upload that nobody waited for came last"


def test_more_memory_than_there_is(device: EmulatedDevice) -> None:
    stream = device.stream()
    held = stream.allocate(6_000)
    with pytest.raises(
        ResourceExhausted, match="4001 bytes of device memory are wanted; 4000 of 10000"
    ) as caught:
        stream.allocate(4_001)
    assert caught.value.reason == Reason.OUT_OF_DEVICE_MEMORY
    del held
    assert stream.allocate(10_000).nbytes == 10_000


def test_copies_that_do_not_fit(device: EmulatedDevice) -> None:
    stream = device.stream()
    memory = stream.allocate(100)
    with pytest.raises(ValueError, match="50 bytes at 51 do not fit a memory of 100"):
        stream.upload(np.zeros(50, np.uint8), memory, 51)
    with pytest.raises(ValueError, match="101 bytes are not in a memory of 100"):
        stream.download(memory, np.zeros(101, np.uint8))


def test_a_kernel_that_writes_beside_its_memory_loses_the_device(device: EmulatedDevice) -> None:
    stream = device.stream()
    source, target = stream.allocate(4 * SIZE), stream.allocate(4 * SIZE - 4)
    x = np.ones(SIZE, np.float32)

    def use() -> None:
        stream.upload(as_bytes(x), source)
        stream.launch(copying(source, target))
        stream.synchronize()

    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="byte 1 behind a memory of 156 bytes") as caught:
            use()
        assert caught.value.reason == Reason.DEVICE_LOST
    assert "elementwise_copy_4" in device.failure


@pytest.mark.parametrize("seed", range(30))
def test_any_program_that_waits_runs_in_an_order_that_keeps_its_promises(policy: Policy, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(policy)
    queues = [scheduler.queue() for _ in range(3)]
    ran: list[tuple[int, int]] = []
    before: dict[tuple[int, int], set[tuple[int, int]]] = {}
    known: list[set[tuple[int, int]]] = [
        set() for _ in queues
    ]  # what must have run before a queue's next item

    def work(item: tuple[int, int]) -> None:
        assert before[item] <= set(ran)
        ran.append(item)

    places: list[tuple[Place, set[tuple[int, int]]]] = []
    for number in range(60):
        at = int(rng.integers(3))
        queue: Queue = queues[at]
        match int(rng.integers(4)):
            case 0 if places:
                place, needed = places[int(rng.integers(len(places)))]
                known[at] |= needed
                scheduler.put(queue, place)
            case 1:
                places.append((Place(queue, queue.asked), set(known[at])))
            case 2 if rng.random() < 0.3:
                scheduler.pass_place(Place(queue, queue.asked))
                assert known[at] <= set(ran)
            case _:
                item = (at, number)
                before[item] = set(known[at])
                known[at].add(item)
                scheduler.put(queue, partial(work, item))
    for queue in queues:
        scheduler.pass_place(Place(queue, queue.asked))
    assert len(ran) == len(set(ran)) == len(before)
