"""Graphs that cannot be: said by the client before it connects, naming the layer by its position and type.

Nobody listens at the target here, so whatever would be sent fails with ServiceUnavailable.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from convservice import (
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    InvalidRequest,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
    Network,
    Node,
    Residual,
    ServiceUnavailable,
)
from tests.client.blocking import Blocking, Connect

X = np.zeros((2, 3, 9, 8), "float32")


def ones(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones(shape, "float32")


def conv(filters: int, given: int, size: int = 3, **options: Any) -> Conv:
    return Conv(ones(filters, given, size, size), **options)


@pytest.fixture
def nowhere(connect: Connect) -> Iterator[Blocking]:
    """A client of a port that is taken and does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield connect(f"127.0.0.1:{taken.getsockname()[1]}", timeout=30)


def run(client: Blocking, network: Network) -> None:
    client.run(network, X)


def stream(client: Blocking, network: Network) -> None:
    list(client.stream(network, [X[0]], shape=X.shape[1:], dtype="float32"))


CALLS = [run, stream]

Parts = Sequence[Layer | Residual | Node]
MISMATCHES: dict[str, tuple[Parts, str]] = {
    "channels": ([conv(4, 3), conv(2, 5)], r"layer 1 \(Conv, id 'layer1'\): weight has 5 input channels"),
    "first channels": ([conv(4, 2)], r"layer 0 \(Conv, id 'layer0'\): weight has 2 input channels"),
    "transposed": (
        [conv(4, 3), ConvTranspose(ones(5, 2, 2, 2))],
        r"layer 1 \(ConvTranspose, id 'layer1'\): weight has 5 input channels",
    ),
    "features": ([conv(4, 3), Flatten(), Linear(ones(5, 10))], r"layer 2 \(Linear, id 'layer2'\): .*10"),
    "vector": ([Flatten(), conv(4, 3)], r"layer 1 \(Conv, id 'layer1'\): "),
    "positions": (
        [conv(4, 3), LocallyConnected(ones(5, 5, 2, 4, 3, 3))],
        r"layer 1 \(LocallyConnected, id 'layer1'\): ",
    ),
    "sum": (
        [Node("a", conv(4, 3), ("input",)), Node("b", conv(2, 3), ("input",)), Node("s", Add(), ("a", "b"))],
        r"layer 2 \(Add, id 's'\) of 'a', 'b': ",
    ),
    "shortcut": (
        [conv(4, 3), Residual([conv(4, 4, stride=2)])],
        r"layer 2 \(Add, id 'layer1'\) of 'layer1\.body0', 'layer0': ",
    ),
    "second head": (
        [
            Node("trunk", conv(4, 3), ("input",)),
            Node("one", conv(2, 4), ("trunk",)),
            Node("two", conv(2, 3), ("trunk",)),
        ],
        r"layer 2 \(Conv, id 'two'\): weight has 3 input channels",
    ),
    "filter": ([MaxPool(2), conv(4, 3, 5)], r"layer 1 \(Conv, id 'layer1'\): the output would be empty"),
    "pooling": ([conv(4, 3), MaxPool(7)], r"layer 1 \(MaxPool, id 'layer1'\): the output would be empty"),
    "one pooling": ([AvgPool(10)], r"layer 0 \(AvgPool, id 'layer0'\): the output would be empty"),
    "pooling at the end": (
        [conv(4, 3), MaxPool(3), AvgPool(3)],
        r"layer 2 \(AvgPool, id 'layer2'\): the output would be empty",
    ),
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("name", MISMATCHES)
def test_shapes_that_do_not_fit(
    nowhere: Blocking, name: str, call: Callable[[Blocking, Network], None]
) -> None:
    parts, message = MISMATCHES[name]
    with pytest.raises(InvalidRequest, match=message) as caught:
        call(nowhere, Network(parts))
    assert caught.value.method is None
    assert caught.value.metadata["position"] in message


WIRINGS: dict[str, tuple[Callable[[], Network], str]] = {
    "cycle": (
        lambda: Network([Node("a", conv(3, 3), ("b",)), Node("b", conv(3, 3), ("a",))]),
        r"layer 0 \(Conv, id 'a'\): its input 'b' is no earlier node",
    ),
    "cycle after a trunk": (
        lambda: Network(
            [
                Node("trunk", conv(3, 3), ("input",)),
                Node("sum", Add(), ("trunk", "back")),
                Node("back", MaxPool(1), ("sum",)),
            ]
        ),
        r"layer 1 \(Add, id 'sum'\): its input 'back' is no earlier node",
    ),
    "itself": (
        lambda: Network([Node("a", MaxPool(2), ("a",))]),
        r"layer 0 \(MaxPool, id 'a'\): its input 'a' is no earlier node",
    ),
    "heads without a trunk": (
        lambda: Network([Node("one", Flatten(), ("trunk",)), Node("two", MaxPool(2), ("trunk",))]),
        r"layer 0 \(Flatten, id 'one'\): its input 'trunk' is no earlier node",
    ),
    "a second head without it": (
        lambda: Network(
            [
                Node("trunk", conv(4, 3), ("input",)),
                Node("one", MaxPool(2), ("trunk",)),
                Node("two", AvgPool(2), ("trunc",)),
            ]
        ),
        r"layer 2 \(AvgPool, id 'two'\): its input 'trunc' is no earlier node",
    ),
    "no input": (
        lambda: Network([Node("a", MaxPool(2), ())]),
        r"layer 0 \(MaxPool, id 'a'\): takes 1 input, not 0",
    ),
    "a sum of one": (
        lambda: Network([Node("a", MaxPool(2), ("input",)), Node("s", Add(), ("a",))]),
        r"layer 1 \(Add, id 's'\): takes 2 to \d+ inputs, not 1",
    ),
    "twice": (
        lambda: Network([Node("a", MaxPool(2), ("input",)), Node("a", AvgPool(2), ("a",))]),
        r"layer 1 \(AvgPool, id 'a'\): the id 'a' is taken",
    ),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_wiring_that_is_no_graph(nowhere: Blocking, name: str) -> None:
    make, message = WIRINGS[name]
    with pytest.raises(InvalidRequest, match=message) as caught:
        run(nowhere, make())
    assert (caught.value.method, caught.value.reason) == (None, "INVALID_NETWORK")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_good_graph_is_sent(nowhere: Blocking, call: Callable[[Blocking, Network], None]) -> None:
    """What the other tests stand on: this client does try to reach its server."""
    with pytest.raises(ServiceUnavailable, match="cannot be reached"):
        call(nowhere, Network([conv(4, 3), MaxPool(2)]))
