"""What one name may hold, so that nobody takes what others need."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convservice.errors import (
    ConvServiceError,
    InvalidRequest,
    NetworkNotFound,
    Reason,
    ResourceExhausted,
)
from convservice.layers import Conv
from convservice.network import Network
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire.enums import Precision
from convservice.wire.networks import inline_to_proto
from convservice_server.config import ServerConfig
from convservice_server.holdings import Holdings
from convservice_server.kept import NODE_OVERHEAD, TENSOR_OVERHEAD
from convservice_server.lanes import Lane
from convservice_server.ledger import Ledger
from convservice_server.settings import gather
from convservice_server.shelf import Shelf
from convservice_server.store import Store
from tests.server.support import (
    WAIT,
    Double,
    Requests,
    Running,
    collect,
    error_of,
    header_message,
    pointwise,
    put_messages,
    running,
    spec_of,
    tensor_messages,
    unary,
    weight,
)

ANN = (("authorization", "Bearer ann-0123456789abcdef"),)
BOB = (("authorization", "Bearer bob-0123456789abcdef"),)
X = np.ones((1, 1, 2, 2), np.float32)

LEASE = 60.0
VALUES = 1000
SIZE = 4 * VALUES + TENSOR_OVERHEAD
ONE = SIZE + NODE_OVERHEAD
"""What a network of one of these tensors counts for."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tensor(value: float) -> Tensor:
    return Tensor.of(np.full((VALUES, 1, 1), value, np.float32))


def network(*values: Tensor) -> Network:
    return Network([Conv(value, groups=1 if at == 0 else VALUES) for at, value in enumerate(values)])


def put(store: Store, owner: str, value: Tensor) -> None:
    with store.promise(owner, value.nbytes) as keep:
        keep(value)


def add(store: Store, owner: str, *values: Tensor) -> str:
    """Registers a network whose tensors come with it."""
    made = network(*values)
    with store.tensors(owner, list(values), {value.digest: value for value in values}):
        store.add(owner, made)
    return made.name


def names(store: Store, owner: str) -> set[str]:
    return set(store.names(owner, "", 1000))


@pytest.fixture
def clock() -> Clock:
    return Clock()


# Settings.


def test_without_names_one_may_have_all_and_with_names_half() -> None:
    alone = ServerConfig(max_streams=9, memory_budget_bytes=1000, weights_budget_bytes=100)
    assert (alone.max_streams_per_name, alone.max_uploads_per_name) == (9, alone.max_uploads)
    assert (alone.max_bytes_per_name, alone.max_weights_per_name_bytes) == (1000, 100)
    named = ServerConfig(
        max_streams=9, max_uploads=1, memory_budget_bytes=1000, weights_budget_bytes=100, token_file="tokens"
    )
    assert (named.max_streams_per_name, named.max_uploads_per_name) == (4, 1)
    assert (named.max_bytes_per_name, named.max_weights_per_name_bytes) == (500, 50)
    assert (alone.max_networks_per_name, named.max_networks_per_name) == (1_000_000, 1000)


def test_a_share_is_of_the_whole() -> None:
    environment = {"CONVSERVICE_MAX_BYTES_PER_NAME": "1MiB", "CONVSERVICE_MAX_WEIGHTS_PER_NAME": "2K"}
    config = gather({"max_streams_per_name": "3"}, environment).config
    assert (config.max_streams_per_name, config.max_bytes_per_name) == (3, 1 << 20)
    assert config.max_weights_per_name_bytes == 2048
    for flags, message in (
        ({"max_streams_per_name": "5", "max_streams": "4"}, "from 1 to 4 = max_streams, not 5"),
        ({"max_uploads_per_name": "0", "max_uploads": "4"}, "from 1 to 4 = max_uploads, not 0"),
        ({"max_bytes_per_name": "lots"}, "a number of bytes"),
        ({"max_networks_per_name": "0"}, "from 1 to 1000000, not 0"),
    ):
        with pytest.raises(InvalidRequest, match=message) as caught:
            gather(flags, {})
        assert caught.value.message.startswith(f"--{next(iter(flags)).replace('_', '-')}: ")


# Counting.


def test_holdings_are_counted_by_name_and_refused_with_the_numbers() -> None:
    holdings = Holdings("max_streams_per_name", "streams", 3)
    holdings.take("ann", 2)
    holdings.take("bob", 3)
    with pytest.raises(ResourceExhausted) as caught:
        holdings.take("ann", 2)
    assert caught.value.message == (
        "the name 'ann' may hold at most 3 streams (max_streams_per_name); it holds 2, this would be 2 more"
    )
    assert caught.value.reason == Reason.NAME_LIMIT
    assert caught.value.metadata == {
        "setting": "max_streams_per_name",
        "limit": "3",
        "held": "2",
        "wanted": "2",
    }
    assert caught.value.retry_after == 1.0
    with pytest.raises(ResourceExhausted, match="all callers together may hold") as caught:
        holdings.take("", 4)
    assert caught.value.retry_after is None, "it never will"
    holdings.give("ann", 2)
    holdings.take("ann", 3)


# What is kept.


def test_one_name_pushes_out_its_own_and_nobody_elses(clock: Clock) -> None:
    store = Store(10 * ONE, LEASE, clock, 3 * ONE)
    bobs = {add(store, "bob", tensor(value)) for value in (100, 101)}
    anns = [add(store, "ann", tensor(value)) for value in range(6)]
    assert names(store, "bob") == bobs
    assert names(store, "ann") == set(anns[3:])
    assert store.used == 5 * ONE


def test_what_was_used_last_stays(clock: Clock) -> None:
    store = Store(10 * ONE, LEASE, clock, 3 * ONE)
    first, second, third = (add(store, "ann", tensor(value)) for value in range(3))
    with store.use("ann", first):
        pass
    fourth = add(store, "ann", tensor(3))
    assert names(store, "ann") == {first, third, fourth}
    assert add(store, "ann", tensor(1)) == second, "one that went may come again"


def test_what_is_in_use_is_not_taken_from_its_name(clock: Clock) -> None:
    store = Store(10 * ONE, LEASE, clock, 2 * ONE)
    first, second = (add(store, "ann", tensor(value)) for value in range(2))
    with store.use("ann", first), store.use("ann", second):
        with pytest.raises(ResourceExhausted) as caught:
            add(store, "ann", tensor(2))
        assert caught.value.reason == Reason.NAME_LIMIT
        assert caught.value.metadata["setting"] == "max_weights_per_name"
        assert caught.value.retry_after is not None
        add(store, "bob", tensor(2))
    add(store, "ann", tensor(2))
    assert first not in names(store, "ann")


def test_networks_are_limited_by_number(clock: Clock) -> None:
    store = Store(10 * ONE, LEASE, clock, networks_per_name=2)
    first, second, third = (add(store, "ann", tensor(value)) for value in range(3))
    assert names(store, "ann") == {second, third}
    with pytest.raises(NetworkNotFound), store.use("ann", first):
        pass
    with store.use("ann", second), store.use("ann", third), pytest.raises(ResourceExhausted) as caught:
        add(store, "ann", tensor(4))
    assert caught.value.metadata["setting"] == "max_networks_per_name"
    assert caught.value.message.startswith("the name 'ann' may hold at most 2 networks that are in use")
    assert add(store, "ann", tensor(2)) == third, "registering again is none more"
    assert names(store, "ann") == {second, third}


def test_a_tensor_that_is_put_counts_for_its_name(clock: Clock) -> None:
    store = Store(10 * SIZE, LEASE, clock, 2 * SIZE)
    put(store, "ann", tensor(1))
    with store.promise("ann", 4 * VALUES):
        for size in (1, 4 * VALUES):
            with pytest.raises(ResourceExhausted) as caught, store.promise("ann", size):
                pass
            assert caught.value.reason == Reason.NAME_LIMIT
        put(store, "bob", tensor(3))
    put(store, "ann", tensor(2))
    clock.now += LEASE
    put(store, "ann", tensor(3))
    assert not store.renew("ann", tensor(1)), "the oldest whose lease had ended went"
    assert store.renew("ann", tensor(3))
    assert store.renew("bob", tensor(3))
    assert store.used == 2 * SIZE, "one tensor of two names is kept once"


def test_a_prepared_form_counts_for_its_name(clock: Clock) -> None:
    double = Double()
    double.prepared_bytes = 4 * VALUES
    store = Store(100 * ONE, LEASE, clock, 2 * ONE)
    first, second = (add(store, "ann", tensor(value)) for value in range(2))
    with store.use("ann", second) as use:
        use.prepared(double, Precision.HIGH)
    assert names(store, "ann") == {second}, "the form pushed the other out"
    tight = Store(100 * ONE, LEASE, clock, ONE)
    name = add(tight, "ann", tensor(1))
    with tight.use("ann", name) as use, pytest.raises(ResourceExhausted) as caught:
        use.prepared(double, Precision.HIGH)
    assert caught.value.reason == Reason.NAME_LIMIT
    assert first not in names(store, "ann")


def test_a_network_of_two_names_goes_from_one_and_stays_with_the_other(clock: Clock) -> None:
    store = Store(100 * ONE, LEASE, clock, 2 * ONE)
    shared = add(store, "ann", tensor(0))
    assert add(store, "bob", tensor(0)) == shared
    with store.use("bob", shared):
        second = add(store, "ann", tensor(1))
        with store.use("ann", second), pytest.raises(ResourceExhausted):
            add(store, "ann", tensor(2))
        assert names(store, "ann") == {shared, second}
    third = add(store, "ann", tensor(2))
    assert names(store, "ann") == {second, third}
    assert names(store, "bob") == {shared}
    assert store.count == 3


def test_a_refusal_takes_nothing_away(clock: Clock) -> None:
    store = Store(100 * ONE, LEASE, clock, 3 * ONE)
    kept = {add(store, "ann", tensor(value)) for value in range(3)}
    with pytest.raises(ResourceExhausted) as caught, store.promise("ann", 4 * ONE):
        pass
    assert caught.value.retry_after is None
    assert names(store, "ann") == kept


@pytest.mark.parametrize("seed", range(20))
def test_the_books_are_right_whatever_happens(seed: int, clock: Clock) -> None:
    chance = random.Random(seed)
    store = Store(9 * ONE, LEASE, clock, 5 * ONE, networks_per_name=3)
    tensors = [tensor(value) for value in range(6)]
    double = Double()
    double.prepared_bytes = 500
    with ExitStack() as uses:
        for _ in range(300):
            owner = chance.choice(["ann", "bob", "carl"])
            try:
                match chance.randrange(8):
                    case 0 | 1 | 2:
                        add(store, owner, *chance.sample(tensors, chance.choice([1, 1, 2])))
                    case 3:
                        put(store, owner, chance.choice(tensors))
                    case 4:
                        store.renew(owner, chance.choice(tensors))
                    case 5:
                        for name in names(store, owner):
                            store.delete(owner, name)
                            break
                    case 6:
                        for name in names(store, owner):
                            use = uses.enter_context(store.use(owner, name))
                            use.prepared(double, chance.choice(list(Precision)))
                            break
                    case _:
                        uses.close()
            except ResourceExhausted:
                pass
            clock.now += chance.choice([0, 0, 1, LEASE])
            check_books(store)
    check_books(store)
    for owner in ("ann", "bob", "carl"):
        for name in names(store, owner):
            store.delete(owner, name)
    check_books(store)
    assert store.count == 0


def check_books(store: Store) -> None:
    """Counts everything anew, and compares."""
    shelf: Shelf = vars(store)["_shelf"]  # what is compared is nobody else's business
    shares: dict[str, Ledger] = vars(shelf)["_shares"]
    assert shelf.total.used == counted(shelf.total) <= shelf.total.budget
    assert set(shelf.weights) == {digest for digest in shelf.weights if shelf.total.has(digest)}
    for owner, share in shares.items():
        assert not share.is_empty
        assert share.used == counted(share)
        assert len(share.networks) <= share.most_networks
        assert set(share.loose) <= {d for d, kept in shelf.weights.items() if owner in kept.leases}
        for name, entry in share.networks.items():
            assert owner in entry.owners
            assert shelf.total.networks[name] is entry
    for name, entry in shelf.total.networks.items():
        assert entry.owners == {owner for owner, share in shares.items() if name in share.networks}
        assert entry.owners or entry.pins
        assert all(shelf.weights[digest] is kept for digest, kept in entry.weights.items())
    for digest, kept in shelf.weights.items():
        assert all(shares[owner].has(digest) for owner in kept.leases)


def counted(ledger: Ledger) -> int:
    tensors = dict(ledger.loose)
    for entry in ledger.networks.values():
        assert not tensors.keys() & entry.weights.keys() - {
            digest for other in ledger.networks.values() for digest in other.weights
        }
        tensors.update(entry.weights)
    charges = [kept.charge for kept in tensors.values()]
    return sum(charges) + sum(entry.charge for entry in ledger.networks.values())


# A server with names.


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text("ann ann-0123456789abcdef\nbob bob-0123456789abcdef\n")
    return str(path)


def refusal(call: Any, *arguments: Any, **options: Any) -> ConvServiceError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=WAIT, **options)
    return error_of(caught.value)


def opened(served: Running, who: Any) -> tuple[Requests, Any]:
    """A stream of that name whose handler runs: its first tensor's header is answered."""
    name = served.stub.RegisterNetwork(
        pb.RegisterNetworkRequest(network=inline_to_proto(pointwise())), timeout=WAIT, metadata=who
    ).name
    requests = Requests([header_message(name, spec_of(X))])
    responses = iter(served.stub.ConvolveStream(requests, timeout=WAIT, metadata=who))
    assert next(responses).WhichOneof("message") == "header"
    return requests, responses


def close(stream: tuple[Requests, Any]) -> None:
    requests, responses = stream
    responses.cancel()
    requests.end()


def test_streams_of_one_name_leave_room_for_another(tokens: str) -> None:
    with running(token_file=tokens, max_streams=4) as served:
        mine = [opened(served, ANN) for _ in range(2)]
        with pytest.raises(grpc.RpcError) as caught:
            list(served.stub.ConvolveStream(iter(()), timeout=WAIT, metadata=ANN))
        refused = error_of(caught.value)
        assert isinstance(refused, ResourceExhausted)
        assert (refused.reason, refused.metadata["limit"]) == (Reason.NAME_LIMIT, "2")
        assert refused.retry_after is not None
        other = opened(served, BOB)
        for stream in (*mine, other):
            close(stream)
        served.settle()
        close(opened(served, ANN))
        served.settle()


def test_memory_of_one_name_leaves_room_for_another(tokens: str) -> None:
    with running(token_file=tokens, memory_budget_bytes="100MiB", max_bytes_per_name="25MiB") as served:
        first = opened(served, ANN)
        reserved = served.server.service.admission.reserved
        assert 12 << 20 > reserved > 6 << 20, "two fit, and a third does not"
        held = [first, *(opened(served, ANN) for _ in range((25 << 20) // reserved - 1))]
        name = pointwise().name
        requests = Requests([*tensor_messages(name, X, 1)])
        requests.end()
        responses = served.stub.ConvolveStream(requests, timeout=WAIT, metadata=ANN)
        refused = collect(responses)[1].error
        assert isinstance(refused, ResourceExhausted)
        assert (refused.reason, refused.metadata["setting"]) == (Reason.NAME_LIMIT, "max_bytes_per_name")
        close(opened(served, BOB))
        for stream in held:
            close(stream)
        served.settle()


def test_uploads_of_one_name_leave_room_for_another(tokens: str) -> None:
    with running(token_file=tokens, max_uploads=2) as served:
        tensor = weight(3.0)
        held: Lane = vars(served.server)["_host"].uploads  # an upload that waits is not seen from outside
        with held.enter("ann"):
            refused = refusal(served.stub.PutWeights, put_messages(tensor), metadata=ANN)
            assert (refused.reason, refused.metadata["limit"]) == (Reason.NAME_LIMIT, "1")
            served.stub.PutWeights(put_messages(tensor), timeout=WAIT, metadata=BOB)
        served.stub.PutWeights(put_messages(tensor), timeout=WAIT, metadata=ANN)


def test_networks_of_one_name_go_when_they_are_too_many(tokens: str) -> None:
    with running(token_file=tokens, max_networks_per_name=2) as served:
        networks = [pointwise(scale=scale) for scale in (1, 2, 3)]
        served.stub.Convolve(unary(networks[0], X), timeout=WAIT, metadata=BOB)
        for one in networks:
            served.stub.Convolve(unary(one, X), timeout=WAIT, metadata=ANN)
        store = served.server.service.store
        assert names(store, "ann") == {one.name for one in networks[1:]}
        assert names(store, "bob") == {networks[0].name}
        refused = refusal(served.stub.Convolve, unary(networks[0], X, inline=False), metadata=ANN)
        assert refused.reason == Reason.NETWORK_NOT_REGISTERED, "and a client sends it again"
