"""Sessions on devices: what overlaps, what waits for what, what is spread, what is given back.

The devices are emulated ones, whose streams do their work in the worst order that events allow: a wait that
is missing gives wrong results under one of the policies. A test of that test takes waits away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from convservice.bands import Band
from convservice.dtypes import FLOAT32, dtype_of
from convservice.errors import BackendUnavailable, Cancelled, InternalError, Reason, ResourceExhausted
from convservice.layers import Activation, Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda import lanes
from convservice_backends.cuda.lanes import SLOTS
from convservice_backends.interface import Session
from convservice_emulator.backend import EmulatorBackend
from convservice_emulator.device import INFO, EmulatedDevice, EmulatedStream
from convservice_emulator.streams import Policy
from tests.helpers import (
    Array,
    Collector,
    assert_same_bits,
    bands_of,
    chain,
    nothing_wrong,
    random_array,
    run,
    spec_of,
    trunk_with_two_heads,
)

SMALL_SLOT = 2 << 10
"""Bytes of a slot that makes pieces of a few rows, so that all slots are in use."""


@pytest.fixture
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "SLOT_BYTES", SMALL_SLOT)


def devices_of(backend: EmulatorBackend) -> list[EmulatedDevice]:
    found: list[Any] = [context.device for context in backend.contexts]
    return found


def network_of(rng: np.random.Generator) -> Network:
    return chain(rng, FLOAT32)


def results(
    backend: EmulatorBackend, network: Network, x: Array, *, rows: int | None, drain: bool
) -> dict[str, Array]:
    """Sends `x` through; results are drained after each band, or only at the end."""
    prepared = backend.prepare(network, Precision.HIGH)
    if drain:
        return run(prepared, x, rows)
    plan = prepared.plan(spec_of(x, rows))
    collector = Collector(network.outputs)
    with closing(prepared.open(plan, nothing_wrong)) as session:
        for given in bands_of(x, rows):
            for band in session.submit(given):
                collector.take(band)
        for band in session.finish():
            collector.take(band)
    return collector.arrays(plan.results)


@pytest.mark.usefixtures("small_slots")
@pytest.mark.parametrize("rows", [None, 1, 7])
@pytest.mark.parametrize("policy", Policy)
def test_no_order_of_the_streams_changes_a_bit(
    policy: Policy, rows: int | None, rng: np.random.Generator
) -> None:
    network, x = trunk_with_two_heads(rng, FLOAT32), random_array(rng, (3, 2, 40, 11), FLOAT32)
    expected = results(EmulatorBackend(), network, x, rows=None, drain=True)
    for drain in (True, False):
        found = results(EmulatorBackend(policy=policy), network, x, rows=rows, drain=drain)
        assert_same_bits(expected, found, f"{policy}, bands of {rows} rows, drained {drain}")


def at_once(self: lanes.Slot) -> None:
    """A slot that is used while its copy is under way."""


def without_wait(self: EmulatedStream, event: Any) -> None:
    """A stream that forgets to wait for another."""


@pytest.mark.usefixtures("small_slots")
def test_a_missing_wait_between_streams_is_noticed(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    network, x = network_of(rng), random_array(rng, (2, 2, 60, 11), FLOAT32)
    expected = results(EmulatorBackend(), network, x, rows=7, drain=False)["output"]
    monkeypatch.setattr(EmulatedStream, "wait", without_wait)
    found = [
        results(EmulatorBackend(policy=policy), network, x, rows=7, drain=False)["output"]
        for policy in (Policy.LAZY, Policy.OTHERS_FIRST)
    ]
    assert not all(np.array_equal(expected, each) for each in found)


@pytest.mark.usefixtures("small_slots")
@pytest.mark.parametrize("wait", ["wait_free", "wait_down"])
def test_a_slot_used_too_early_is_noticed(
    wait: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    network, x = network_of(rng), random_array(rng, (9, 2, 60, 11), FLOAT32)
    expected = results(EmulatorBackend(), network, x, rows=None, drain=False)["output"]
    monkeypatch.setattr(lanes.Slot, wait, at_once)
    found = results(EmulatorBackend(policy=Policy.LAZY), network, x, rows=None, drain=False)["output"]
    assert not np.array_equal(expected, found)


def test_bands_overlap_as_long_as_there_are_slots(rng: np.random.Generator) -> None:
    """Nothing is waited for while slots last, so that a device can do three things at once."""
    network, x = Network([Activation("relu")]), random_array(rng, (1, 2, 64, 5000), FLOAT32)
    prepared = EmulatorBackend(policy=Policy.LAZY).prepare(network, Precision.HIGH)
    with closing(prepared.open(prepared.plan(spec_of(x, 8)), nothing_wrong)) as session:
        came = [len(list(session.submit(band))) for band in bands_of(x, 8)]
        left = len(list(session.drain()))
        assert came[:SLOTS] == [0] * SLOTS
        assert left == SLOTS, "as many results are held as there are slots"
        assert not list(session.finish())


def launches_of(policy: Policy, rng: np.random.Generator, rows: int) -> int:
    """Kernels of a convolution of 240 rows that come a few at a time and are not drained."""
    network = Network([Conv(random_array(rng, (2, 2, 3, 3), FLOAT32), padding=1)])
    backend, x = EmulatorBackend(policy=policy), random_array(rng, (1, 2, 240, 1200), FLOAT32)
    results(backend, network, x, rows=rows, drain=False)
    (device,) = devices_of(backend)
    return device.launches


def test_rows_are_collected_while_the_device_is_behind(rng: np.random.Generator) -> None:
    """One large launch instead of many small ones, where no launch would have begun sooner."""
    at_once = launches_of(Policy.EAGER, rng, 3)
    collected = launches_of(Policy.LAZY, rng, 3)
    bands, copies = 240 // 3, 2  # of a band into the ring buffer, of a result into its slot
    assert at_once >= (copies + 1) * bands
    assert collected <= copies * bands + SLOTS


def test_a_drained_session_holds_nothing_back(rng: np.random.Generator) -> None:
    """Two layers of 3x3 leave two rows behind, whether or not the device is behind."""
    layers = [Conv(random_array(rng, (1, 1, 3, 3), FLOAT32), padding=1) for _ in range(2)]
    x = random_array(rng, (1, 1, 40, 20_000), FLOAT32)
    for policy in Policy:
        prepared = EmulatorBackend(policy=policy).prepare(Network(layers), Precision.HIGH)
        came, ends = 0, list[int]()
        with closing(prepared.open(prepared.plan(spec_of(x, 4)), nothing_wrong)) as session:
            for given in bands_of(x, 4):
                came += sum(band.array.shape[2] for band in session.submit(given))
                came += sum(band.array.shape[2] for band in session.drain())
                ends.append(came)
        assert ends == [*range(2, 38, 4), 40]


def test_an_upload_waits_for_no_kernel(rng: np.random.Generator) -> None:
    network, x = Network([Activation("relu")]), random_array(rng, (1, 2, 64, 5000), FLOAT32)
    backend = EmulatorBackend(policy=Policy.LAZY)
    prepared = backend.prepare(network, Precision.HIGH)
    with closing(prepared.open(prepared.plan(spec_of(x, 8)), nothing_wrong)) as opened:
        session: Any = opened
        for band in islice(bands_of(x, 8), SLOTS):
            assert not list(session.submit(band))
        session._ways[0].lane.streams.upload.synchronize()
        assert [device.launches for device in devices_of(backend)] == [0]


def test_tensors_go_to_the_device_with_least_to_do(rng: np.random.Generator) -> None:
    backend, network = EmulatorBackend(3), network_of(rng)
    prepared = backend.prepare(network, Precision.HIGH)
    plan = prepared.plan(spec_of(random_array(rng, (1, 2, 64, 11), FLOAT32), 8))
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(closing(prepared.open(plan, nothing_wrong)))
        assert [context.memory.promised for context in backend.contexts] == [2 * plan.device_bytes] * 3


def test_results_that_have_come_down_leave_without_being_asked_for(rng: np.random.Generator) -> None:
    network, x = Network([Activation("relu")]), random_array(rng, (1, 2, 64, 5000), FLOAT32)
    prepared = EmulatorBackend(policy=Policy.EAGER).prepare(network, Precision.HIGH)
    with closing(prepared.open(prepared.plan(spec_of(x, 32)), nothing_wrong)) as session:
        assert list(session.submit(Band(x[:, :, :32])))
        assert not list(session.drain())


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("shape", [(7, 2, 20, 11), (5, 2, 700, 400)], ids=["whole", "flowing"])
def test_samples_are_spread_over_devices_and_come_back_in_order(
    rows: int | None, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    network = Network([Conv(random_array(rng, (2, 2, 3, 1), FLOAT32), padding=((1, 1), (0, 0)))])
    x = random_array(rng, shape, FLOAT32)
    rows = rows if shape[2] < 100 else 350
    alone = run(EmulatorBackend().prepare(network, Precision.HIGH), x, rows)
    backend = EmulatorBackend(3)
    assert_same_bits(alone, run(backend.prepare(network, Precision.HIGH), x, rows), "three devices")
    assert all(device.launches for device in devices_of(backend)), "every device had a part"
    assert backend.describe().workers == 3


def test_a_session_gives_everything_back(rng: np.random.Generator) -> None:
    backend = EmulatorBackend(2, policy=Policy.LAZY)
    network, x = network_of(rng), random_array(rng, (2, 2, 64, 11), FLOAT32)
    prepared = backend.prepare(network, Precision.HIGH)
    plan = prepared.plan(spec_of(x, 8))
    session: Session = prepared.open(plan, nothing_wrong)
    assert [context.memory.promised for context in backend.contexts] == [plan.device_bytes] * 2
    list(session.submit(Band(x[:1, :, :8])))
    weights = sum(context.memory.resident for context in backend.contexts)
    assert 0 < sum(device.taken_bytes for device in devices_of(backend)) - weights <= 2 * plan.device_bytes
    assert not all(device.is_idle for device in devices_of(backend))
    session.close()
    assert all(device.is_idle for device in devices_of(backend)), "memory goes when nothing is at work on it"
    session.close()
    assert [context.memory.promised for context in backend.contexts] == [0, 0]
    del session
    assert sum(device.taken_bytes for device in devices_of(backend)) == weights


def test_weights_go_with_their_network(rng: np.random.Generator) -> None:
    backend = EmulatorBackend()
    prepared = backend.prepare(network_of(rng), Precision.HIGH)
    run(prepared, random_array(rng, (1, 2, 30, 11), FLOAT32))
    (context,) = backend.contexts
    assert context.memory.resident
    del prepared
    assert not context.memory.resident


def test_a_session_that_cannot_be_closed_well_gives_its_promise_back(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    backend = EmulatorBackend(2)
    prepared = backend.prepare(network_of(rng), Precision.HIGH)
    session = prepared.open(
        prepared.plan(spec_of(random_array(rng, (2, 2, 64, 11), FLOAT32), 8)), nothing_wrong
    )
    with monkeypatch.context() as patch:
        patch.setattr(EmulatedStream, "synchronize", broken)
        with pytest.raises(InternalError, match="refused"):
            session.close()
    assert [context.memory.promised for context in backend.contexts] == [0, 0]
    session.close()


def broken(self: EmulatedStream) -> None:
    raise InternalError("the device refused a call", reason=Reason.INTERNAL)


def small_device(memory_bytes: int) -> EmulatorBackend:
    return EmulatorBackend(info=replace(INFO, memory_bytes=memory_bytes))


def test_a_tensor_that_does_not_fit_is_refused_and_the_next_runs(rng: np.random.Generator) -> None:
    network, small = network_of(rng), random_array(rng, (1, 2, 30, 11), FLOAT32)
    backend = small_device(4 << 20)
    prepared = backend.prepare(network, Precision.HIGH)
    large = spec_of(np.broadcast_to(np.float32(0), (1, 2, 9000, 4000)))
    with pytest.raises(ResourceExhausted, match="bytes of device memory") as caught:
        prepared.open(prepared.plan(large), nothing_wrong)
    assert caught.value.reason == Reason.OUT_OF_DEVICE_MEMORY
    (context,) = backend.contexts
    assert context.memory.promised == 0
    assert run(prepared, small)["output"].size


def test_memory_that_runs_out_in_spite_of_the_plan(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Another process may take the device's memory: the tensor fails, the backend works on."""
    backend = EmulatorBackend()
    network, x = network_of(rng), random_array(rng, (1, 2, 30, 11), FLOAT32)
    prepared = backend.prepare(network, Precision.HIGH)
    expected = run(prepared, x)
    with monkeypatch.context() as patch:
        patch.setattr(EmulatedDevice, "take", refuse)
        with pytest.raises(ResourceExhausted, match="somebody else"):
            run(prepared, x)
    assert backend.failure == ""
    assert [context.memory.promised for context in backend.contexts] == [0]
    assert_same_bits(expected, run(prepared, x), "after the memory came back")


def refuse(self: EmulatedDevice, nbytes: int, *, stays: bool = False) -> None:
    raise ResourceExhausted("somebody else has the memory", reason=Reason.OUT_OF_DEVICE_MEMORY)


def test_a_device_that_fails_for_good_takes_the_backend_out_of_service(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    backend = EmulatorBackend(2)
    network, x = network_of(rng), random_array(rng, (2, 2, 30, 11), FLOAT32)
    prepared = backend.prepare(network, Precision.HIGH)
    run(prepared, x)
    devices_of(backend)[1].fail("an illegal memory access")
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="an illegal memory access") as caught:
            run(prepared, x)
        assert caught.value.reason == Reason.DEVICE_LOST
    assert backend.failure == "an illegal memory access"
    backend.close()


def test_a_session_that_is_cancelled_stops_between_pieces(rng: np.random.Generator) -> None:
    network = Network([Activation("relu")])
    x = random_array(rng, (1, 1, 4096, 1024), FLOAT32)
    checks: Iterator[int] = iter(range(3))

    def check() -> None:
        if next(checks, None) is None:
            raise Cancelled("given up")

    prepared = EmulatorBackend().prepare(network, Precision.HIGH)
    with closing(prepared.open(prepared.plan(spec_of(x)), check)) as session, pytest.raises(Cancelled):
        list(session.submit(Band(x)))


@pytest.mark.parametrize("out", ["float16", "uint8", "float64", "bfloat16"])
@pytest.mark.parametrize("given", ["int8", "float16"])
def test_every_map_and_result_is_rounded_once(given: str, out: str, rng: np.random.Generator) -> None:
    """A float16 network given integers holds them in float32: no integer is rounded before it is summed."""
    weight = random_array(rng, (3, 2, 3, 3), dtype_of("float16"))
    network = Network([Conv(weight, padding=1), Activation("tanh")])
    x = random_array(rng, (2, 2, 12, 9), dtype_of(given))
    prepared = EmulatorBackend().prepare(network, Precision.HIGH)
    found = run(prepared, x, out_dtype=dtype_of(out))["output"]
    wide = x.astype(np.float32), weight.astype(np.float32)
    sums = np.zeros((2, 3, 12, 9), np.float32)
    padded = np.pad(wide[0], ((0, 0), (0, 0), (1, 1), (1, 1)))
    for i, j in np.ndindex(3, 3):
        sums += np.einsum("oc,nchw->nohw", wide[1][:, :, i, j], padded[:, :, i : i + 12, j : j + 9])
    near = np.tanh(sums.astype(np.float16).astype(np.float32))
    expected = near if out != "uint8" else np.clip(np.rint(near), 0, 255)
    tolerance = 1 if out == "uint8" else 0.02
    assert np.abs(found.astype(np.float32) - expected).max() <= tolerance
