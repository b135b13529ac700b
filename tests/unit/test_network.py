from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, dtype_of
from convservice.errors import InvalidRequest
from convservice.geometry import SampleShape, first_row_kept, real_position
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.network import INPUT, MAX_NODES, Network, Node, Residual
from tests.helpers import chain, trunk_with_two_heads
from tests.strategies import Case, cases, fits

ONES = np.ones((1, 1, 3, 3), np.float32)


def test_the_canonical_form_is_the_one_the_contract_specifies() -> None:
    weight, bias = np.ones((2, 1, 1, 2), np.float32), np.zeros(2, np.float32)
    network = Network(
        [
            Node(
                "a.b-c_1",
                Conv(
                    weight, bias, stride=2, padding=((0, 1), (2, 0)), activation=Activation("leaky_relu", 0.5)
                ),
            ),
            Node(
                "b",
                Conv(
                    np.ones((2, 1, 1, 1), np.float32),
                    padding="same",
                    groups=2,
                    dilation=(1, 3),
                    padding_mode="reflect",
                ),
                ("a.b-c_1",),
            ),
            Node("c", Activation("gelu"), ("a.b-c_1",)),
        ],
        {"z": "c", "first": "b"},
    )
    sizes = "".join(n.to_bytes(8, "little").hex() for n in (2, 1, 1, 2))
    first = hashlib.sha256(
        b"convservice.tensor.v1\0float32\0" + bytes.fromhex("04000000" + sizes + "0000803f" * 4)
    )
    second = hashlib.sha256(b"convservice.tensor.v1\0float32\0\x01\0\0\0\x02" + bytes(7) + bytes(8))
    sizes = "".join(n.to_bytes(8, "little").hex() for n in (2, 1, 1, 1))
    third = hashlib.sha256(
        b"convservice.tensor.v1\0float32\0" + bytes.fromhex("04000000" + sizes + "0000803f" * 2)
    )
    text = (
        '{"nodes":['
        '{"id":"a.b-c_1","inputs":["input"],"layer":{"activation":{"function":"leaky_relu",'
        '"negative_slope":"3fe0000000000000"},"bias":"BIAS","dilation":[1,1],"groups":1,'
        '"padding":[[0,1],[2,0]],"padding_mode":"zeros","stride":[2,2],"type":"conv","weight":"FIRST"}},'
        '{"id":"b","inputs":["a.b-c_1"],"layer":{"activation":{"function":"linear"},"bias":null,'
        '"dilation":[1,3],"groups":2,"padding":"same","padding_mode":"reflect","stride":[1,1],'
        '"type":"conv","weight":"SECOND"}},'
        '{"id":"c","inputs":["a.b-c_1"],"layer":{"activation":{"function":"gelu"},"type":"activation"}}'
        '],"outputs":[{"name":"z","node":"c"},{"name":"first","node":"b"}]}'
    )
    for word, tensor in (("FIRST", first), ("BIAS", second), ("SECOND", third)):
        text = text.replace(word, tensor.hexdigest())
    assert network.canonical() == text.encode()
    digest = hashlib.sha256(b"convservice.network.v1\0" + text.encode())
    assert network.digest == digest.digest()
    assert network.name == "networks/sha256-" + digest.hexdigest()
    assert network.name == "networks/sha256-95595363e1a339e72bb85baf1173fb141571a5b07ac232d52a0b607a78087ec9"


def test_the_name_depends_on_everything_and_nothing_else() -> None:
    def named(**options: Any) -> str:
        return Network([Conv(ONES, **options)]).name

    plain = named()
    assert plain == named(
        stride=1, padding=0, dilation=(1, 1), groups=1, padding_mode="zeros", activation="linear"
    )
    assert plain == Network([Conv(ONES.astype(">f4"))], {"output": "layer0"}).name
    others = [
        named(stride=2),
        named(padding=1),
        named(padding="same"),
        named(dilation=2),
        named(padding_mode="reflect"),
        named(activation="relu"),
        named(activation=Activation("leaky_relu", 0.1)),
        named(activation=Activation("leaky_relu", 0.2)),
        named(bias=np.zeros(1, np.float32)),
        Network([Conv(ONES * 2)]).name,
        Network([Conv(ONES.astype(np.float64))]).name,
        Network([Conv(ONES)], {"other": "layer0"}).name,
        Network([Node("other", Conv(ONES))]).name,
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_the_canonical_form_is_plain_json(rng: np.random.Generator) -> None:
    form = json.loads(trunk_with_two_heads(rng, FLOAT64).canonical())
    assert [node["id"] for node in form["nodes"]] == ["trunk", "wide", "low"]
    assert form["outputs"] == [{"name": "wide", "node": "wide"}, {"name": "low", "node": "low"}]


def test_a_chain_names_its_layers_and_its_output() -> None:
    network = Network([Conv(ONES), Activation("relu")])
    assert [(node.id, node.inputs) for node in network.nodes] == [
        ("layer0", (INPUT,)),
        ("layer1", ("layer0",)),
    ]
    assert network.outputs == {"output": "layer1"}
    assert (network.rank, network.parameter_count) == (2, 9)
    assert "Activation" in repr(network)


@pytest.mark.parametrize(
    ("layers", "outputs", "message"),
    [
        ([], None, "1 to 512 layers, not 0"),
        ([Activation()] * (MAX_NODES + 1), None, "1 to 512 layers, not 513"),
        (
            [Node("a", Activation())],
            {f"o{n}": "a" for n in range(MAX_NODES + 1)},
            "1 to 512 outputs, not 513",
        ),
        ([Node("a b", Activation())], None, "letters, digits"),
        ([Node("", Activation())], None, "letters, digits"),
        ([Node("a" * 65, Activation())], None, "letters, digits"),
        ([Node("input", Activation())], None, "the id 'input' is taken"),
        ([Node("a", Activation()), Node("a", Activation())], None, "layer 1 .*the id 'a' is taken"),
        (
            [Node("a", Activation(), ("b",)), Node("b", Activation())],
            None,
            "its input 'b' is no earlier node",
        ),
        ([Node("a", Activation(), ("a",))], None, "its input 'a' is no earlier node"),
        ([Node("a", Activation(), ())], None, "takes 1 input, not 0"),
        ([Node("a", Activation(), (INPUT, INPUT))], None, "takes 1 input, not 2"),
        ([Node("a", Add())], None, r"layer 0 \(Add, id 'a'\): takes 2 to 64 inputs, not 1"),
        ([Add()], None, "takes 2 to 64 inputs, not 1"),
        ([Node("a", Add(), (INPUT,) * 65)], None, "takes 2 to 64 inputs, not 65"),
        ([Node("a", Activation()), Activation()], None, "layer 0 is a Node; a chain is made of layers"),
        ([Activation(), "relu"], None, "layer 1 is a str"),
        ([Activation()], {"out": "missing"}, "output 'out' names 'missing', which is no node"),
        ([Activation()], {"out": INPUT}, "output 'out' names 'input', which is no node"),
        ([Activation()], {"a b": "layer0"}, "an output's name"),
    ],
)
def test_wiring_that_is_no_such_graph_is_refused(layers: Any, outputs: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        Network(layers, outputs)
    assert caught.value.reason == "INVALID_NETWORK"


def test_weights_of_two_dtypes_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="float32, float64") as caught:
        Network([Conv(ONES), Conv(ONES.astype(np.float64))])
    assert caught.value.reason == "DATA_TYPE_MISMATCH"


def test_a_network_has_the_dtype_of_its_weights() -> None:
    network = Network([Conv(ONES)])
    for dtype in DTYPES:
        if dtype.is_float and dtype != FLOAT32:
            with pytest.raises(InvalidRequest, match=f"x is {dtype} and weight is float32") as caught:
                network.dtype(dtype)
            assert caught.value.reason == "DATA_TYPE_MISMATCH"
        else:
            assert network.dtype(dtype) == FLOAT32


def test_a_network_without_weights_has_the_inputs_dtype() -> None:
    network = Network([Activation("tanh")])
    assert network.dtype(FLOAT64) == FLOAT64
    assert network.dtype(dtype_of("int8")) == FLOAT32


def test_a_tensor_used_twice_counts_once() -> None:
    layer = Conv(ONES)
    assert len(Network([layer, layer, Conv(layer.filters)]).tensors) == 1


def test_shapes_name_the_layer_that_cannot_take_its_input() -> None:
    network = Network([Conv(ONES), Conv(ONES), Conv(np.ones((1, 2, 3, 3), np.float32))])
    with pytest.raises(
        InvalidRequest, match=r"layer 2 \(Conv, id 'layer2'\): weight has 2 input channels"
    ) as caught:
        network.output_shape((1, 9, 9))
    assert caught.value.metadata["node"] == "layer2"
    assert (caught.value.reason, caught.value.field) == ("CHANNEL_MISMATCH", "sample_shape")


def test_output_shapes_are_a_dict_where_there_are_several(rng: np.random.Generator) -> None:
    network = trunk_with_two_heads(rng, FLOAT32)
    assert network.output_shape((5, 2, 12, 10)) == {"wide": (5, 2, 12, 10), "low": (5, 3, 4, 3)}
    assert Network(network.nodes, {"low": "low"}).output_shape((2, 12, 10)) == (3, 4, 3)


def held_by_scanning(layer: Conv, sample: SampleShape) -> int:
    """The rows held before every single output row, where each leaves as soon as it can; the most of them."""
    window = layer.window(sample)
    most = 1
    for row in range(layer.output_sample(sample).height):
        seen = layer.real_rows(row, row + 1, sample)[1]
        start, _ = window.span(row, row + 1)
        most = max(most, seen - first_row_kept(start, window.after, seen, sample.rows, layer.row_mode))
    return most


def held_by_simulation(layer: Conv, sample: SampleShape) -> int:
    """Most rows that are both here and read later, when each output row leaves as soon as it can."""
    window, size = layer.window(sample), sample.height
    count = layer.output_sample(sample).height
    reads = [
        [p for q in window.positions(i) if (p := real_position(q, size, layer.padding_mode)) is not None]
        for i in range(count)
    ]
    most, seen = 0, 0
    for row in range(count):
        seen = max([seen, *(p + 1 for p in reads[row])])
        later = [p for fields in reads[row:] for p in fields if p < seen]
        most = max(most, seen - min(later, default=seen))
    return most


@given(cases())
def test_the_rows_held_are_enough_and_not_much_more(case: Case) -> None:
    assume(fits(case))
    layer = case.layer
    sample = SampleShape(case.x.shape[1], case.x.shape[2], tuple(case.x.shape[3:]))
    held, window = layer.rows_held(sample), layer.window(sample)
    assert held == held_by_scanning(layer, sample)
    needed = held_by_simulation(layer, sample)
    assert needed <= held <= max(1, min(sample.height, needed + window.extent + window.before + window.after))


WINDOWS = st.fixed_dictionaries(
    {
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 3),
        "padding": st.tuples(st.tuples(st.integers(0, 4), st.integers(0, 4))),
        "padding_mode": st.sampled_from(["zeros", "reflect", "replicate"]),
    }
)


@given(st.integers(1, 5), WINDOWS)
def test_the_rows_held_do_not_grow_with_the_height(kernel: int, options: dict[str, Any]) -> None:
    layer = Conv(np.ones((1, 1, kernel), np.float32), **options)
    short, tall, unknown = (layer.rows_held(SampleShape(1, height)) for height in (60, 16 * 60, None))
    assert short == tall <= unknown + options["padding"][0][1]


def needed_by_simulation(network: Network, node_id: str, rows: int, height: int) -> int:
    """Fewest rows of the network's input with which every node can give what the node's rows need."""
    shapes = network.shapes(SampleShape(2, height, (12,)))
    nodes = {node.id: node for node in network.nodes}

    def can(available: int) -> bool:
        have = {INPUT: available}
        for node in network.nodes:
            source = node.inputs[0]
            size, window = shapes[source].height, node.layer.window(shapes[source])
            ready = 0
            for i in range(shapes[node.id].height):
                fields = [real_position(q, size, node.layer.row_mode) for q in window.positions(i)]
                if any(p is not None and p >= have[source] for p in fields):
                    break
                ready += 1
            have[node.id] = ready
        return have[nodes[node_id].id] >= rows

    return next(available for available in range(height + 1) if can(available))


@pytest.mark.parametrize("height", [7, 16, 31])
def test_rows_needed_are_those_of_a_simulation(rng: np.random.Generator, height: int) -> None:
    for network in (chain(rng, FLOAT32), trunk_with_two_heads(rng, FLOAT32)):
        shapes = network.shapes(SampleShape(2, height, (12,)))
        for node in network.nodes:
            for rows in range(1, shapes[node.id].height + 1):
                found = network.input_rows_needed(node.id, rows, shapes)
                assert found == needed_by_simulation(network, node.id, rows, height)


def test_blocks_are_needed_whole(rng: np.random.Generator) -> None:
    network = Network([Conv(ONES, padding=1), Conv(ONES)])
    shapes = network.shapes(SampleShape(1, 100, (9,)))
    # 1 row of the last is a block of 8, which needs 10 rows of the first: 3 blocks of 4, which need 13.
    assert network.input_rows_needed("layer1", 1, shapes, {"layer0": 4, "layer1": 8}) == 13
    assert network.input_rows_needed("layer1", 8, shapes, {"layer0": 4, "layer1": 8}) == 13
    assert network.input_rows_needed("layer1", 98, shapes, {"layer0": 64, "layer1": 64}) == 100
    assert network.input_rows_needed("layer1", 0, shapes) == 0


def test_the_plan_counts_rows_and_bytes(rng: np.random.Generator) -> None:
    network = Network(
        [
            Conv(np.ones((4, 2, 3, 3), np.float32), padding=1),
            Conv(np.ones((1, 4, 5, 1), np.float32), stride=(2, 1)),
        ]
    )
    for shape in ((2, 50, 10), (7, 2, 50, 10), (2, None, 10)):
        first, last = network.plan(shape, "uint8")
        assert (first.node, first.rows_held, first.bytes_held, first.delay_rows) == (
            "layer0",
            3,
            3 * 2 * 10,
            2,
        )
        assert (last.node, last.rows_held, last.bytes_held, last.delay_rows) == (
            "layer1",
            5,
            5 * 4 * 10 * 4,
            6,
        )
        assert last.input_shape.channels == 4
        assert last.output_shape.rows == (None if None in shape else 23)


@pytest.mark.timeout(30)
def test_the_longest_chain_and_the_widest_padding_are_planned_at_once() -> None:
    deep = Network([Activation("relu")] * MAX_NODES)
    assert deep.plan((1, 100, 100))[-1].delay_rows == 1
    wide = Conv(np.ones((1, 1, 3), np.float32), padding=2**30)
    assert wide.rows_held(SampleShape(1, 10)) == 3
    assert wide.rows_held(SampleShape(1, None)) == 3


TWO = np.ones((2, 2, 3), np.float32)
FORMS: list[tuple[Layer, str]] = [
    (
        MaxPool(2, padding=1, dilation=3),
        '{"ceil_mode":false,"dilation":3,"kernel_size":2,"padding":1,"stride":2,"type":"max_pool"}',
    ),
    (
        MaxPool((2, 3), padding="same", stride=1, ceil_mode=True),
        (
            '{"ceil_mode":true,"dilation":[1,1],"kernel_size":[2,3],"padding":"same","stride":[1,1],'
            '"type":"max_pool"}'
        ),
    ),
    (
        AvgPool(3, padding=((0, 1),), count_include_pad=False),
        (
            '{"ceil_mode":false,"count_include_pad":false,"kernel_size":[3],"padding":[[0,1]],"stride":[3],'
            '"type":"avg_pool"}'
        ),
    ),
    (
        AvgPool(3, padding="valid"),
        '{"ceil_mode":false,"count_include_pad":true,"kernel_size":3,"padding":0,"stride":3,"type":"avg_pool"}',
    ),
    (GlobalMaxPool(), '{"type":"global_max_pool"}'),
    (GlobalAvgPool(), '{"type":"global_avg_pool"}'),
    (Flatten(), '{"type":"flatten"}'),
    (
        LocallyConnected(TWO[..., None], activation="relu"),
        (
            '{"activation":{"function":"relu"},"bias":null,"dilation":[1],"groups":1,"padding":[[0,0]],'
            '"stride":[1],"type":"locally_connected","weight":"WEIGHT"}'
        ),
    ),
    (
        ConvTranspose(TWO, stride=2, output_padding=1, groups=2),
        (
            '{"activation":{"function":"linear"},"bias":null,"dilation":[1],"groups":2,"output_padding":[1],'
            '"padding":[[0,0]],"stride":[2],"type":"conv_transpose","weight":"WEIGHT"}'
        ),
    ),
    (
        Linear(TWO[0], TWO[0, :, 0], activation=Activation("leaky_relu", 0.5)),
        (
            '{"activation":{"function":"leaky_relu","negative_slope":"3fe0000000000000"},"bias":"BIAS",'
            '"type":"linear","weight":"WEIGHT"}'
        ),
    ),
]


@pytest.mark.parametrize(("layer", "form"), FORMS)
def test_every_layers_canonical_form_is_the_one_the_contract_specifies(layer: Layer, form: str) -> None:
    for word, tensor in zip(("WEIGHT", "BIAS"), layer.tensors, strict=False):
        form = form.replace(word, tensor.digest.hex())
    text = (
        '{"nodes":[{"id":"a","inputs":["input"],"layer":' + form + '},{"id":"b","inputs":["a","a"],"layer":'
        '{"activation":{"function":"linear"},"type":"add"}}],"outputs":[{"name":"output","node":"b"}]}'
    )
    network = Network([Node("a", layer), Node("b", Add(), ("a", "a"))])
    assert network.canonical() == text.encode()


def test_pooling_of_any_rank_is_another_than_that_of_one() -> None:
    assert MaxPool(2).rank is None
    assert MaxPool((2,)).rank == MaxPool(2, stride=(1,)).rank == MaxPool(2, padding=((0, 1),)).rank == 1
    assert Network([MaxPool(2)]).name != Network([MaxPool((2,))]).name
    assert Network([MaxPool(2)]).name == Network([MaxPool(2, stride=2, padding="valid", dilation=1)]).name


@pytest.mark.parametrize(
    ("layers", "rank"),
    [
        ([Linear(np.ones((1, 1)))], 0),
        ([Activation("relu"), Linear(np.ones((1, 1)))], 0),
        ([Flatten(), Linear(np.ones((1, 1)))], None),
        ([MaxPool(2), Flatten(), Linear(np.ones((1, 1)))], None),
        ([MaxPool((2, 2)), Flatten(), Linear(np.ones((1, 1)))], 2),
        ([GlobalAvgPool(), Conv(np.ones((1, 1, 1)))], 1),
        ([Activation("relu"), MaxPool(2)], None),
        ([Residual([Activation("relu")], [Conv(np.ones((1, 1, 1, 1, 1)))])], 3),
    ],
)
def test_the_rank_is_that_of_the_input(layers: list[Layer], rank: int | None) -> None:
    assert Network(layers).rank == rank


def test_maps_that_do_not_fit_one_another_are_named() -> None:
    trunk = Node("trunk", Conv(ONES))
    network = Network([trunk, Node("sum", Add(), ("trunk", "input"))])
    with pytest.raises(
        InvalidRequest,
        match=r"layer 1 \(Add, id 'sum'\) of 'trunk', 'input': all inputs of Add must have one shape, input 0"
        r" has \(1, 4, 4\) and input 1 \(1, 6, 6\)",
    ) as caught:
        network.output_shape((1, 6, 6))
    assert (caught.value.reason, caught.value.metadata["node"]) == ("INVALID_SHAPE", "sum")


def test_linear_says_what_must_come_before_it() -> None:
    network = Network([MaxPool((1, 1)), Linear(np.ones((3, 36)))])
    with pytest.raises(InvalidRequest, match=r"layer 1 \(Linear, .* put a Flatten\(\) before it"):
        network.output_shape((1, 6, 6))
    fits = Network([MaxPool((1, 1)), Flatten(), Linear(np.ones((3, 36)))])
    assert fits.output_shape((1, 6, 6)) == (3,)
    with pytest.raises(InvalidRequest, match="weight has 36 input features, the input has 72") as caught:
        fits.output_shape((2, 6, 6))
    assert caught.value.reason == "CHANNEL_MISMATCH"


@pytest.mark.parametrize("layer", [MaxPool(1), AvgPool(1), GlobalAvgPool(), GlobalMaxPool()])
def test_a_vector_has_no_windows(layer: Layer) -> None:
    with pytest.raises(InvalidRequest, match=r"1 to 3 spatial axes, the input is a vector: \(7,\)") as caught:
        layer.output_shape((5, 7))
    assert caught.value.reason == "INVALID_SHAPE"


def test_the_plan_of_a_sum_counts_every_input() -> None:
    network = Network([Conv(ONES, padding=1), Residual([Conv(np.ones((1, 1, 5, 5), np.float32), padding=2)])])
    for shape in ((1, 90, 7), (1, None, 7)):
        body, shortcut = network.plan(shape)[1:]
        assert body.port_rows == (5,)
        assert len(shortcut.port_rows) == 2
        assert shortcut.rows_held == sum(shortcut.port_rows)
        assert shortcut.bytes_held == shortcut.rows_held * 7 * 4
        assert shortcut.delay_rows == body.delay_rows == 4
