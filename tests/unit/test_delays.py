"""What branches hold, held against a driver that moves rows through the graph one run at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from convservice.delays import port_rows
from convservice.errors import InvalidRequest
from convservice.geometry import SampleShape
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    MaxPool,
)
from convservice.network import INPUT, Network, Node, Residual

HEIGHTS = st.integers(1, 40)


def conv(kernel: int, **options: Any) -> Conv:
    return Conv(np.ones((1, 1, kernel), np.float32), **options)


@st.composite
def keeping(draw: st.DrawFn) -> Layer:
    """A layer that keeps the height."""
    kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    extent = (kernel - 1) * dilation + 1
    before = draw(st.integers(0, extent - 1))
    padding = [(before, extent - 1 - before)]
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return MaxPool(kernel, stride=1, dilation=dilation, padding=padding)
    if kind == 1:
        weight = np.ones((1, 1, kernel), np.float32)
        return ConvTranspose(weight, dilation=dilation, padding=padding)
    mode = draw(st.sampled_from(["zeros", "replicate", "reflect"]))
    return conv(kernel, dilation=dilation, padding=padding, padding_mode=mode)


GATE = MaxPool(2, stride=1)

HALVING: list[list[Layer]] = [
    [conv(3, stride=2, padding=1)],
    [conv(1, stride=2)],
    [AvgPool(2, stride=2, ceil_mode=True)],
    [conv(5, padding=2), MaxPool(3, stride=2, padding=1)],
]
"""Chains that halve the height, rounded up."""

DOUBLING: list[list[Layer]] = [
    [ConvTranspose(np.ones((1, 1, kernel), np.float32), stride=2, padding=padding, output_padding=added)]
    for kernel, padding, added in ((2, 0, 0), (4, 1, 0), (3, 1, 1), (1, 0, 1))
]
"""Chains that double it."""


@st.composite
def blocks(draw: st.DrawFn, depth: int = 1) -> Residual:
    """A residual block, perhaps with others inside, whose branches give the same height."""
    chains = st.lists(keeping() if depth == 0 else keeping() | blocks(depth - 1), max_size=3)
    body, shortcut = draw(chains), draw(chains)
    if draw(st.booleans()):
        scale = DOUBLING if draw(st.booleans()) else HALVING
        at = draw(st.integers(0, len(body)))
        body = [*body[:at], *draw(st.sampled_from(scale)), *body[at:]]
        shortcut = [*draw(st.sampled_from(scale)), *shortcut]
    return Residual(body or [Activation("relu")], shortcut)


@dataclass
class State:
    """One node at work: rows given to each port, rows put out, and the most that each port has held."""

    layer: Layer
    samples: list[SampleShape]
    rows: int | None
    given: list[int]
    most: list[int]
    done: int = 0

    def ready(self) -> int:
        """Rows that could be put out with what has been given."""
        end = self.done + 200 if self.rows is None else self.rows
        count = self.done
        while count < end and all(
            self.layer.real_rows(self.done, count + 1, sample)[1] <= given
            for sample, given in zip(self.samples, self.given, strict=True)
        ):
            count += 1
        return count


@dataclass
class Driver:
    """Moves rows depth first, as sessions do: a port with room for a part of a run takes that part.

    Attributes:
        network: the network.
        height: of its input.
        room: rows that the ports of each node with several inputs can hold.
        computed: node id to the rows that it waits for.
        handed: node id to the rows of a run.
        backwards: whether consumers are served last to first.
        known: whether the height is known from the beginning.
    """

    network: Network
    height: int
    room: Mapping[str, tuple[int, ...]]
    computed: Mapping[str, int]
    handed: Mapping[str, int]
    backwards: bool = False
    known: bool = True

    def run(self) -> dict[str, tuple[int, ...]]:
        """Sends a sample through; hands back the most rows that every port with a limit held between two
        runs. Fails where rows find no room."""
        sample = SampleShape(1, self.height)
        final = self.network.shapes(sample)
        shapes = final if self.known else self.network.shapes(sample.with_rows(None))
        self.states = {
            node.id: State(
                node.layer,
                [shapes[source] for source in node.inputs],
                shapes[node.id].rows,
                [0] * len(node.inputs),
                [0] * len(node.inputs),
            )
            for node in self.network.nodes
        }
        step = self.handed.get(INPUT, 1)
        for row in range(0, self.height, step):
            self.feed(INPUT, min(step, self.height - row))
        for node in self.network.nodes:
            state = self.states[node.id]
            state.samples = [final[source] for source in node.inputs]
            state.rows = final[node.id].rows
            self.advance(node.id)
        assert all(state.done == final[name].rows for name, state in self.states.items())
        return {name: tuple(self.states[name].most) for name in self.room}

    def feed(self, source: str, count: int) -> None:
        consumers = [node for node in self.network.nodes if source in node.inputs]
        for node in reversed(consumers) if self.backwards else consumers:
            for port, name in enumerate(node.inputs):
                if name == source:
                    self.put(node.id, port, count)

    def put(self, name: str, port: int, count: int) -> None:
        state = self.states[name]
        while count:
            taken = count
            if name in self.room:
                taken = min(count, self.room[name][port] - (state.given[port] - state.done))
                assert taken > 0, f"port {port} of {name} holds {self.room[name][port]} rows and is full"
            state.given[port] += taken
            count -= taken
            self.advance(name)
            state.most[port] = max(state.most[port], state.given[port] - state.done)

    def advance(self, name: str) -> None:
        state = self.states[name]
        while (ready := state.ready()) > state.done:
            if ready - state.done < self.computed.get(name, 1) and ready != state.rows:
                return
            count = min(ready - state.done, self.handed.get(name, 1))
            state.done += count
            self.feed(name, count)


def test_the_shortcut_of_a_block_holds_what_its_body_delays() -> None:
    network = Network([Residual([conv(3, padding=1), conv(5, padding=2)])])
    body, shortcut = port_rows(network.nodes, network.shapes(SampleShape(1, 10_000)))["layer0"]
    assert body == 1
    assert 4 <= shortcut <= 7
    assert port_rows(network.nodes, network.shapes(SampleShape(1, None)))["layer0"][1] <= 7


def test_a_branch_inside_a_branch_is_delayed_by_both() -> None:
    inner = Residual([conv(9, padding=4)])
    outer = Network([Residual([inner, conv(9, padding=4)])])
    rows = port_rows(outer.nodes, outer.shapes(SampleShape(1, 1000)))
    assert 5 <= rows["layer0.body0"][1] <= 7
    assert 9 <= rows["layer0"][1] <= 13


def test_what_lies_before_a_block_plays_no_part() -> None:
    block = Residual([conv(3, padding=1)])
    alone, behind = Network([block]), Network([conv(3, stride=2), conv(9), GATE, block])
    for network in (alone, behind):
        (rows,) = port_rows(network.nodes, network.shapes(SampleShape(1, 5000))).values()
        assert rows == (1, 3)


def test_a_sum_with_itself_holds_a_row_of_each() -> None:
    network = Network([Node("a", conv(3)), Node("b", Add(), ("a", "a"))])
    assert port_rows(network.nodes, network.shapes(SampleShape(1, 50))) == {"b": (1, 1)}


def test_branches_that_only_meet_at_one_height_hold_up_to_all_of_it() -> None:
    halved = Node("halved", conv(1, stride=2))
    wide = Node("wide", conv(51))
    network = Network([halved, wide, Node("sum", Add(), ("halved", "wide"))])
    rows = port_rows(network.nodes, network.shapes(SampleShape(1, 100)))["sum"]
    assert rows[1] <= rows[0]
    assert 25 <= rows[0] <= 50
    Driver(network, 100, {"sum": rows}, {}, {}).run()
    with pytest.raises(
        InvalidRequest, match=r"layer 2 \(Add, id 'sum'\) needs the height.* 1/2, 1 rows"
    ) as caught:
        network.plan((1, None))
    assert caught.value.reason == "HEIGHT_REQUIRED"


def test_maps_of_global_pooling_may_be_added_at_any_height() -> None:
    nodes = [
        Node("mean", GlobalAvgPool()),
        Node("largest", GlobalMaxPool()),
        Node("sum", Add(), ("mean", "largest")),
    ]
    network = Network(nodes)
    for height in (7, None):
        plans = network.plan((1, 1, height))
        assert [plan.port_rows for plan in plans] == [(1,), (1,), (1, 1)]
        assert [plan.delay_rows for plan in plans] == [height] * 3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("nested", [True, False])
def test_the_largest_graphs_are_planned_at_once(nested: bool) -> None:
    layer = conv(3, stride=2**30, padding=((2**30, 2**30),))
    if nested:
        nodes = [Node(f"c{i}", conv(3, padding=1), (f"c{i - 1}" if i else INPUT,)) for i in range(255)]
        last = "c254"
        for i in range(254):
            nodes.append(Node(f"a{i}", Add(), (last, f"c{253 - i}")))
            last = f"a{i}"
    else:
        nodes = [Node("c", layer)]
        nodes += [Node(f"a{i}", Add(), (nodes[-1].id, *(["c"] * 63))) for i in range(500)]
    network = Network(nodes)
    assert len(network.plan((1, 3))) == len(nodes)
    assert len(network.plan((1, 2**31 - 1))) == len(nodes)


@pytest.mark.timeout(900)
@given(st.data(), HEIGHTS, st.booleans(), st.booleans())
def test_there_is_room_for_what_branches_bring(data: Any, height: int, backwards: bool, known: bool) -> None:
    network = Network(data.draw(st.lists(keeping() | blocks(), min_size=1, max_size=3)))
    sample = SampleShape(1, height)
    names = [INPUT, *(node.id for node in network.nodes)]
    handed = {name: data.draw(st.integers(1, 6)) for name in names}
    computed = {name: data.draw(st.integers(1, handed[name])) for name in names[1:]}
    try:
        network.shapes(sample)
    except InvalidRequest:
        reject()
    shapes = network.shapes(sample if known else sample.with_rows(None))
    try:
        room = port_rows(network.nodes, shapes, computed, handed)
    except InvalidRequest as exc:  # branches of different rates that this height makes equal by chance
        if known or exc.reason != "HEIGHT_REQUIRED":
            raise
        reject()
    held = Driver(network, height, room, computed, handed, backwards, known).run()
    assert held.keys() == {node.id for node in network.nodes if len(node.inputs) > 1}
