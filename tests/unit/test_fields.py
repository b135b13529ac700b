"""Receptive fields through networks, against plain loops that carry along what each value depends on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from convservice import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    InvalidRequest,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
    Network,
    Node,
)
from convservice.fields import NetworkField, runs_of
from convservice.geometry import real_position

Mask = NDArray[np.bool_]
"""(*shape of a feature map, *shape of the input): which inputs each value depends on."""


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def places(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in sizes))


def through(layer: Layer, given: Mask, rank: int) -> Mask:
    """What the layer's values depend on, given what its input's depend on."""
    shape = given.shape[: given.ndim - rank]
    seen = given.shape[given.ndim - rank :]
    if isinstance(layer, Flatten):
        return given.reshape(-1, *seen)
    out = layer.output_shape((1, *shape))[1:]
    found = np.zeros((*out, *seen), np.bool_)
    for channel, *index in places(out):
        if isinstance(layer, Linear):
            found[channel] = given.any(axis=0)
            continue
        for place in through_a_window(layer, channel, tuple(index), shape, out):
            found[(channel, *index)] |= given[place]
    return found


def through_a_window(
    layer: Layer, channel: int, index: tuple[int, ...], shape: tuple[int, ...], out: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """The values that one neuron looks at, from the layer's own formula."""
    if isinstance(layer, GlobalAvgPool | GlobalMaxPool):
        yield from ((channel, *place) for place in places(shape[1:]))
    elif isinstance(layer, ConvTranspose):
        for c, *place in places(shape):
            reached = [
                any(p * s - before + k * d == i for k in range(size))
                for p, s, (before, _), d, size, i in zip(
                    place, layer.stride, layer.padding, layer.dilation, layer.kernel, index, strict=True
                )
            ]
            if c // (shape[0] // layer.groups) == channel // (out[0] // layer.groups) and all(reached):
                yield (c, *place)
    elif isinstance(layer, Activation | Add):
        yield (channel, *index)
    else:
        field = layer.receptive_field(index, (1, *shape))  # of one layer; tested by itself
        axes = [
            [real for p in axis if (real := real_position(p, size, field.mode)) is not None]
            for axis, size in zip(field.axes, field.sizes, strict=True)
        ]
        group = getattr(layer, "groups", shape[0])
        for c in range(shape[0]):
            if c * group // shape[0] == channel * group // out[0]:
                yield from ((c, *place) for place in itertools.product(*axes))


def dependencies(network: Network, shape: tuple[int, ...]) -> dict[str, Mask]:
    """By node, which inputs each of its values depends on."""
    size = int(np.prod(shape))
    found: dict[str, Mask] = {"input": np.eye(size, dtype=np.bool_).reshape(*shape, *shape)}
    for node in network.nodes:
        parts = [through(node.layer, found[source], len(shape)) for source in node.inputs]
        found[node.id] = np.logical_or.reduce(parts)
    return found


NETWORKS: dict[str, tuple[Network, tuple[int, ...]]] = {
    "chain": (
        Network([Conv(ones(3, 2, 3, 3), stride=2, padding=1), MaxPool(2, stride=1), Conv(ones(2, 3, 2, 1))]),
        (2, 9, 8),
    ),
    "dilated": (
        Network([Conv(ones(1, 1, 2, 3), dilation=3), Conv(ones(1, 1, 2, 2), dilation=(2, 1), stride=(2, 3))]),
        (1, 12, 14),
    ),
    "gaps": (Network([Conv(ones(1, 1, 1), stride=3), Conv(ones(1, 1, 2), stride=2, dilation=2)]), (1, 25)),
    "reflected": (
        Network(
            [
                Conv(ones(1, 1, 3, 4), padding="same", padding_mode="reflect"),
                Conv(ones(1, 1, 3, 3), padding=((2, 0), (1, 3)), padding_mode="replicate"),
            ]
        ),
        (1, 6, 5),
    ),
    "groups": (
        Network(
            [
                Conv(ones(4, 2, 2, 2), groups=2),
                AvgPool(2, padding=1, ceil_mode=True),
                Conv(ones(8, 1, 1, 1), groups=4),
            ]
        ),
        (4, 5, 5),
    ),
    "unshared": (Network([LocallyConnected(ones(2, 1, 3, 2, 2, 3), stride=2, groups=2)]), (2, 6, 5)),
    "up": (
        Network(
            [
                ConvTranspose(ones(2, 1, 3, 2), stride=(2, 3), padding=1, output_padding=(1, 0), groups=2),
                ConvTranspose(ones(2, 2, 2, 3), dilation=(3, 2)),
            ]
        ),
        (2, 4, 3),
    ),
    "holes": (Network([ConvTranspose(ones(1, 1, 2), stride=5), Activation("relu")]), (1, 4)),
    "cross": (
        Network(
            [
                Node("wide", Conv(ones(1, 1, 1, 5), padding=((0, 0), (2, 2)))),
                Node("high", Conv(ones(1, 1, 5, 1), padding=((2, 2), (0, 0)))),
                Node("sum", Add("relu"), ("wide", "high", "input")),
                Node("more", Conv(ones(2, 1, 2, 2)), ("sum",)),
            ]
        ),
        (1, 7, 8),
    ),
    "head": (
        Network([Conv(ones(3, 1, 2, 2), stride=2), Flatten(), Activation("tanh"), Linear(ones(4, 12))]),
        (1, 4, 5),
    ),
    "flat": (Network([MaxPool(2), Flatten()]), (2, 4, 6)),
    "twice flat": (Network([Flatten(), Flatten()]), (2, 3)),
    "three": (
        Network([Conv(ones(2, 1, 2, 2, 1), stride=(1, 2, 1)), GlobalMaxPool(), Flatten()]),
        (1, 4, 4, 2),
    ),
    "vector": (Network([Linear(ones(3, 5)), Activation("relu"), Linear(ones(2, 3))]), (5,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_field_is_what_a_neuron_depends_on(name: str) -> None:
    network, shape = NETWORKS[name]
    depends = dependencies(network, shape)
    for node in network.nodes:
        out = depends[node.id].shape[: -len(shape)]
        for channel, *index in places(out):
            where = index or channel
            expected = depends[node.id][(channel, *index)]
            check(network.receptive_field(where, (3, *shape), node.id, channel), expected)
        if len(out) > 1:
            together = np.asarray(depends[node.id].any(axis=0))
            for place in places(out[1:]):
                check(network.receptive_field(place, (3, *shape), node.id), np.asarray(together[place]))


def check(found: NetworkField, expected: Mask) -> None:
    assert np.array_equal(found.mask(), expected)
    assert found.value_count == expected.sum()
    bounds = [(int(at.min()), int(at.max()) + 1) if len(at) else (0, 0) for at in np.nonzero(expected)]
    assert [found.channels, *found.inside] == bounds


@st.composite
def chains(draw: st.DrawFn) -> tuple[Network, tuple[int, ...]]:
    """Two or three windowed layers of any geometry on one axis, and an input."""
    layers: list[Layer] = []
    for _ in range(draw(st.integers(2, 3))):
        kernel, stride, dilation = (draw(st.integers(1, 3)) for _ in range(3))
        pads = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        if draw(st.booleans()):
            mode = draw(st.sampled_from(["zeros", "reflect", "replicate"]))
            layers.append(
                Conv(ones(1, 1, kernel), stride=stride, dilation=dilation, padding=(pads,), padding_mode=mode)
            )
        else:
            layers.append(
                ConvTranspose(ones(1, 1, kernel), stride=stride, dilation=dilation, padding=(pads,))
            )
    return Network(layers), (1, draw(st.integers(1, 12)))


@given(chains())
def test_a_chain_of_any_geometry(case: tuple[Network, tuple[int, ...]]) -> None:
    network, shape = case
    try:
        network.output_shape(shape)
    except InvalidRequest:
        return
    for node, depends in dependencies(network, shape).items():
        if node != "input":
            for at in range(depends.shape[1]):
                check(network.receptive_field(at, shape, node), depends[0, at])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6))
def test_runs_are_in_order_with_gaps_between(given_runs: list[tuple[int, int]]) -> None:
    runs = runs_of(given_runs)
    assert {at for run in runs for at in range(*run)} == {at for run in given_runs for at in range(*run)}
    assert all(start < stop for start, stop in runs)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))


@pytest.mark.timeout(20)
def test_a_field_as_large_as_a_huge_image() -> None:
    block = [Conv(ones(4, 4, 3, 3), padding=1), Conv(ones(4, 4, 3, 3), padding=1, stride=2)]
    network = Network([*block * 3, GlobalAvgPool(), Flatten(), Linear(ones(3, 4))])
    field = network.receptive_field(1, (4, 2**30, 2**30))
    assert field.inside == ((0, 2**30), (0, 2**30))
    assert field.value_count == 4 * 2**60


@pytest.mark.timeout(20)
def test_many_residual_blocks_do_not_multiply_regions() -> None:
    nodes = [Node("stem", Conv(ones(2, 1, 3, 3), padding=1))]
    for block in range(40):
        before = nodes[-1].id
        nodes.append(Node(f"{block}a", Conv(ones(2, 2, 3, 3), padding=1, activation="relu"), (before,)))
        nodes.append(Node(f"{block}b", Add("relu"), (f"{block}a", before)))
    field = Network(nodes).receptive_field((50, 50), (1, 101, 101))
    assert len(field.regions) == 1
    assert field.inside == ((9, 92), (9, 92))


def test_a_neuron_that_is_not_there() -> None:
    network = Network([Conv(ones(2, 1, 3, 3)), Flatten()])
    wrong: list[tuple[Any, str, int | None, str]] = [
        ((0, 9), "layer0", None, r"neuron \(0, 9\) is outside the feature map of size \(3, 3\)"),
        (18, "layer1", None, r"neuron \(18,\) is outside the feature map of size \(18,\)"),
        ((0, 0), "conv", None, "'conv' is no node of the network; its nodes are layer0, layer1"),
        ((0, 0), "layer0", 2, "channel must be from 0 to 1, not 2"),
    ]
    for index, node, channel, message in wrong:
        with pytest.raises(InvalidRequest, match=message):
            network.receptive_field(index, (1, 5, 5), node, channel)
    two = Network(network.nodes, {"a": "layer0", "b": "layer1"})
    with pytest.raises(InvalidRequest, match="several outputs; give one of their nodes: layer0, layer1"):
        two.receptive_field((0, 0), (1, 5, 5))
    with pytest.raises(InvalidRequest, match=r"layer 0 \(Conv, id 'layer0'\): weight has 1 input channels"):
        network.receptive_field(0, (4, 5, 5))
