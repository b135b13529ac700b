"""The store: leases, holds, pins, eviction, owners, and forms that are prepared once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from convservice.errors import InvalidRequest, NetworkNotFound, Reason, ResourceExhausted
from convservice.layers import Conv
from convservice.network import Network
from convservice.tensors import Tensor
from convservice.wire.enums import Precision
from convservice_server.kept import NODE_OVERHEAD, TENSOR_OVERHEAD
from convservice_server.store import Store
from tests.server.support import WAIT, Double, DoubleNetwork

LEASE = 60.0
VALUES = 10_000
SIZE = 4 * VALUES + TENSOR_OVERHEAD
ONE = SIZE + NODE_OVERHEAD
"""What a network of one of these tensors counts for."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tensor(value: float) -> Tensor:
    return Tensor.of(np.full((VALUES, 1, 1), value, np.float32))


def put(store: Store, value: Tensor, owner: str = "") -> None:
    with store.promise(owner, value.nbytes) as keep:
        keep(value)


def reference(value: Tensor) -> Tensor:
    return Tensor.reference(value.digest, value.dtype, value.shape)


def network(*values: Tensor) -> Network:
    """A network that refers to these tensors."""
    return Network([Conv(value, groups=1 if at == 0 else VALUES) for at, value in enumerate(values)])


def add(store: Store, *values: Tensor, owner: str = "", brought: bool = False) -> str:
    """Registers a network of tensors, as `uploads.register` does."""
    own = {value.digest: value for value in values} if brought else {}
    with store.tensors(owner, [reference(value) for value in values], own) as found:
        made = network(*(found[value.digest] for value in values))
        store.add(owner, made)
    return made.name


def is_here(store: Store, name: str, owner: str = "") -> bool:
    try:
        store.get(owner, name)
    except NetworkNotFound:
        return False
    return True


# Leases.


def test_a_tensor_is_held_for_its_lease_and_makes_room_after(clock: Clock) -> None:
    store = Store(SIZE, LEASE, clock)
    put(store, tensor(1))
    with pytest.raises(
        ResourceExhausted, match=f"need {SIZE} bytes; of the server's {SIZE} .* at most 0"
    ) as caught:
        put(store, tensor(2))
    assert caught.value.reason == Reason.WEIGHTS_BUDGET
    assert caught.value.retry_after is not None
    clock.now += LEASE
    put(store, tensor(2))
    assert not store.renew("", reference(tensor(1)))
    assert store.renew("", reference(tensor(2)))
    assert store.used == SIZE


def test_a_tensor_stays_after_its_lease_as_long_as_there_is_room(clock: Clock) -> None:
    store = Store(3 * SIZE, LEASE, clock)
    put(store, tensor(1))
    clock.now += 2 * LEASE
    assert store.renew("", reference(tensor(1)))
    assert store.used == SIZE
    clock.now += 2 * LEASE
    assert is_here(store, add(store, tensor(1)))


def test_putting_again_renews_the_lease(clock: Clock) -> None:
    store = Store(SIZE, LEASE, clock)
    put(store, tensor(1))
    clock.now += LEASE - 1
    assert store.renew("", reference(tensor(1)))
    clock.now += LEASE - 1
    with pytest.raises(ResourceExhausted):
        put(store, tensor(2))


def test_a_network_takes_the_leases_over(clock: Clock) -> None:
    store = Store(2 * SIZE + NODE_OVERHEAD, LEASE, clock)
    put(store, tensor(1))
    name = add(store, tensor(1))
    assert store.used == ONE
    clock.now += 10 * LEASE
    put(store, tensor(2))
    assert is_here(store, name)


def test_without_a_lease_the_tensor_goes_with_its_network(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    put(store, tensor(1))
    store.delete("", add(store, tensor(1)))
    assert store.used == 0


def test_a_lease_outlives_the_network(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    put(store, tensor(1))
    name = add(store, tensor(1))
    assert store.renew("", reference(tensor(1)))
    store.delete("", name)
    assert store.used == SIZE


def test_a_promise_holds_room_and_gives_it_back(clock: Clock) -> None:
    store = Store(SIZE, LEASE, clock)
    with store.promise("", 4 * VALUES):
        assert store.used == SIZE
        with pytest.raises(ResourceExhausted), store.promise("", 1):
            pass
    assert store.used == 0


def test_two_uploads_of_one_tensor_keep_it_once(clock: Clock) -> None:
    store = Store(2 * SIZE, LEASE, clock)
    with store.promise("", 4 * VALUES) as first, store.promise("", 4 * VALUES) as second:
        first(tensor(1))
        second(tensor(1))
    assert store.used == SIZE


def test_what_can_never_fit_is_not_to_be_tried_again(clock: Clock) -> None:
    with pytest.raises(ResourceExhausted, match="never be kept here") as caught:
        put(Store(SIZE - 1, LEASE, clock), tensor(1))
    assert caught.value.retry_after is None


# Eviction.


def test_the_longest_unused_network_makes_room(clock: Clock) -> None:
    store = Store(3 * ONE, LEASE, clock)
    names = [add(store, tensor(value), brought=True) for value in range(3)]
    with store.use("", names[0]):
        pass
    fourth = add(store, tensor(3), brought=True)
    assert [is_here(store, name) for name in (*names, fourth)] == [True, False, True, True]
    assert store.used == 3 * ONE


def test_what_is_pinned_is_not_evicted(clock: Clock) -> None:
    store = Store(2 * ONE, LEASE, clock)
    first, second = (add(store, tensor(value), brought=True) for value in range(2))
    with store.use("", first):
        third = add(store, tensor(2), brought=True)
        assert [is_here(store, name) for name in (first, second, third)] == [True, False, True]
        with store.use("", third), pytest.raises(ResourceExhausted):
            add(store, tensor(3), brought=True)
        assert is_here(store, third)


def test_a_refusal_evicts_nothing(clock: Clock) -> None:
    store = Store(2 * ONE, LEASE, clock)
    first, second = (add(store, tensor(value), brought=True) for value in range(2))
    with store.use("", first), pytest.raises(ResourceExhausted), store.promise("", 5 * VALUES):
        pass
    assert is_here(store, first)
    assert is_here(store, second)


def test_a_shared_tensor_stays_while_either_network_does(clock: Clock) -> None:
    shared, own = tensor(1), tensor(2)
    store = Store(10 * SIZE, LEASE, clock)
    first = add(store, shared, brought=True)
    both = add(store, shared, own, brought=True)
    assert store.used == 2 * SIZE + 3 * NODE_OVERHEAD
    store.delete("", first)
    assert store.used == 2 * SIZE + 2 * NODE_OVERHEAD
    store.delete("", both)
    assert store.used == 0


def test_a_shared_tensor_is_one_object_however_it_came(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    first = add(store, tensor(1), brought=True)
    second = add(store, tensor(1), tensor(2), brought=True)
    kept = {value.digest: value for value in store.get("", first).tensors}
    assert any(value is kept.get(value.digest) for value in store.get("", second).tensors)


def test_making_room_does_not_take_what_the_new_network_is_made_of(clock: Clock) -> None:
    shared = tensor(1)
    store = Store(2 * SIZE + 2 * NODE_OVERHEAD, LEASE, clock)
    first = add(store, shared, brought=True)
    second = add(store, shared, tensor(2), brought=True)
    assert not is_here(store, first)
    assert {value.digest for value in store.get("", second).tensors} == {shared.digest, tensor(2).digest}
    assert store.used == 2 * SIZE + 2 * NODE_OVERHEAD


# References.


def test_missing_tensors_are_named(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    put(store, tensor(1))
    with pytest.raises(NetworkNotFound) as caught:
        add(store, tensor(1), tensor(2))
    assert caught.value.reason == Reason.WEIGHTS_MISSING
    assert caught.value.metadata == {"count": "1", "digests": tensor(2).digest.hex()}


def test_a_reference_of_another_shape_is_refused(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    put(store, tensor(1))
    wrong = Tensor.reference(tensor(1).digest, tensor(1).dtype, (1, VALUES, 1))
    with pytest.raises(InvalidRequest) as caught:
        store.renew("", wrong)
    assert caught.value.reason == Reason.TENSOR_MISMATCH
    with pytest.raises(InvalidRequest), store.tensors("", [wrong], {}):
        pass


def test_a_name_is_no_permission(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    put(store, tensor(1), "ann")
    name = add(store, tensor(1), owner="ann")
    with pytest.raises(NetworkNotFound), store.use("bob", name):
        pass
    with pytest.raises(NetworkNotFound):
        store.get("bob", name)
    with pytest.raises(NetworkNotFound):
        store.delete("bob", name)
    with pytest.raises(NetworkNotFound):
        add(store, tensor(1), owner="bob")
    assert store.names("bob", "", 10) == []
    put(store, tensor(1), "bob")
    assert add(store, tensor(1), owner="bob") == name
    store.delete("ann", name)
    assert is_here(store, name, "bob")
    assert not is_here(store, name, "ann")
    store.delete("bob", name)
    assert store.used == 0


def test_names_come_in_order_and_in_pages(clock: Clock) -> None:
    store = Store(100 * SIZE, LEASE, clock)
    names = sorted(add(store, tensor(value), brought=True) for value in range(5))
    assert store.names("", "", 3) == names[:3]
    assert store.names("", names[2], 3) == names[3:]


# Pins and forms.


def test_a_deleted_network_stays_until_its_last_use_ends(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    name = add(store, tensor(1), brought=True)
    with ExitStack() as uses:
        pinned = uses.enter_context(store.use("", name))
        uses.enter_context(store.use("", name))
        store.delete("", name)
        with pytest.raises(NetworkNotFound), store.use("", name):
            pass
        assert pinned.network.name == name
        assert store.used == ONE
    assert store.used == 0


def test_a_network_registered_again_while_in_use_stays(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    name = add(store, tensor(1), brought=True)
    with store.use("", name):
        store.delete("", name)
        assert add(store, tensor(1), brought=True) == name
    assert store.used == ONE


@pytest.fixture
def double() -> Iterator[Double]:
    backend = Double()
    yield backend
    backend.prepare_gate.set()


def test_a_form_is_prepared_once_per_precision_and_counted(clock: Clock, double: Double) -> None:
    double.prepared_bytes = 500
    store = Store(10 * SIZE, LEASE, clock)
    name = add(store, tensor(1), brought=True)
    with store.use("", name) as use:
        form = use.prepared(double, Precision.HIGH)
        assert use.prepared(double, Precision.HIGH) is form
        assert use.prepared(double, Precision.FAST) is not form
        assert store.used == ONE + 1000
    assert double.prepared == 2
    store.delete("", name)
    assert store.used == 0


def test_two_threads_that_ask_at_once_get_the_same_form(clock: Clock, double: Double) -> None:
    double.prepare_gate.clear()
    store = Store(10 * SIZE, LEASE, clock)
    name = add(store, tensor(1), brought=True)
    ready = threading.Barrier(3)
    forms: list[object] = []

    def ask() -> None:
        with store.use("", name) as use:
            ready.wait(WAIT)
            forms.append(use.prepared(double, Precision.HIGH))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    ready.wait(WAIT)
    double.prepare_gate.set()
    for thread in threads:
        thread.join(WAIT)
    assert double.prepared == 1
    assert forms[0] is forms[1]


def test_a_form_that_does_not_fit_is_refused_and_not_kept(clock: Clock, double: Double) -> None:
    double.prepared_bytes = 1
    store = Store(ONE, LEASE, clock)
    name = add(store, tensor(1), brought=True)
    with store.use("", name) as use, pytest.raises(ResourceExhausted):
        use.prepared(double, Precision.HIGH)
    assert double.prepared == 0, "it was refused before anything was allocated"
    assert store.used == ONE


@pytest.mark.parametrize(("dtype", "itemsize"), [(np.float16, 4), (np.float32, 4), (np.float64, 8)])
def test_room_for_the_largest_form_is_held_while_it_is_made(
    clock: Clock, double: Double, monkeypatch: pytest.MonkeyPatch, dtype: type, itemsize: int
) -> None:
    store = Store(10 * SIZE, LEASE, clock)
    double.prepared_bytes = 7
    name = add(store, Tensor.of(np.ones((VALUES, 1, 1), dtype)), brought=True)
    kept, seen = store.used, list[int]()
    prepare = double.prepare

    def observed(network: Network, precision: Precision) -> DoubleNetwork:
        seen.append(store.used)
        return prepare(network, precision)

    monkeypatch.setattr(double, "prepare", observed)
    with store.use("", name) as use:
        use.prepared(double, Precision.HIGH)
    assert seen == [kept + itemsize * VALUES]
    assert store.used == kept + 7


def test_a_form_that_takes_more_than_foreseen_is_refused(clock: Clock, double: Double) -> None:
    store = Store(ONE + SIZE, LEASE, clock)
    double.prepared_bytes = SIZE + 1
    name = add(store, tensor(1), brought=True)
    with store.use("", name) as use:
        with pytest.raises(ResourceExhausted):
            use.prepared(double, Precision.HIGH)
        assert store.used == ONE
        double.prepared_bytes = SIZE
        assert use.prepared(double, Precision.HIGH).nbytes == SIZE
    assert store.used == ONE + SIZE


def test_a_form_that_cannot_be_made_gives_its_room_back(
    clock: Clock, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(network: Network, precision: Precision) -> DoubleNetwork:
        raise MemoryError

    store = Store(10 * SIZE, LEASE, clock)
    name = add(store, tensor(1), brought=True)
    monkeypatch.setattr(double, "prepare", fails)
    with store.use("", name) as use, pytest.raises(MemoryError):
        use.prepared(double, Precision.HIGH)
    assert store.used == ONE
