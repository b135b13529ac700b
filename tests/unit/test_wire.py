from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from convservice.bands import DataFormat, TensorSpec
from convservice.dtypes import DTYPES, FLOAT32
from convservice.errors import InvalidRequest, NetworkNotFound
from convservice.geometry import MAX_SIZE, PaddingMode, SampleShape
from convservice.layers import FUNCTIONS, Activation, Add, AvgPool, Conv, ConvTranspose, MaxPool
from convservice.network import INPUT, Network, Node
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire import enums, headers, networks
from convservice.wire import weights as carried
from convservice.wire.enums import Precision
from convservice.wire.headers import ResultSpec, TensorReport, TensorRequest
from tests.helpers import every_layer
from tests.strategies import Case, Fitted, cases, fitted, specs

MILLISECONDS = st.integers(0, 2**40)


@pytest.mark.parametrize(
    ("values", "enum", "prefix"),
    [
        (enums.DATA_FORMATS, pb.DataFormat, "DATA_FORMAT_"),
        (enums.PADDING_MODES, pb.PaddingMode, "PADDING_MODE_"),
        (enums.PRECISIONS, pb.Precision, "PRECISION_"),
        (enums.ACTIVATIONS, pb.ActivationFunction, "ACTIVATION_FUNCTION_"),
    ],
)
def test_every_enum_has_the_contracts_numbers(values: Any, enum: Any, prefix: str) -> None:
    assert len(values) == len(enum.keys())
    for number, value in enumerate(values):
        if number == 0:
            assert enum.Name(0) == f"{prefix}UNSPECIFIED"
            continue
        assert enum.Name(number) == f"{prefix}{str(value).upper()}"
        assert enums.number_of(values, value) == number
        assert enums.value_of(values, number, "f") == value


def test_unknown_enum_numbers_are_refused_with_their_field() -> None:
    for number in (-1, 4, 2**31 - 1):
        with pytest.raises(InvalidRequest, match=f"padding_mode is {number}") as caught:
            enums.value_of(enums.PADDING_MODES, number, "padding_mode")
        assert (caught.value.reason, caught.value.field) == ("INVALID_PARAMETER", "padding_mode")


@st.composite
def requests(draw: st.DrawFn) -> TensorRequest:
    return TensorRequest(
        network=draw(st.text(max_size=8)),
        spec=draw(specs(unknown_height=draw(st.booleans()))),
        out_dtype=draw(st.sampled_from([None, *DTYPES])),
        backend=draw(st.text(max_size=5)),
        precision=draw(st.sampled_from(Precision)),
        timeout_ms=draw(MILLISECONDS),
        tensor_id=draw(st.integers(0, 2**64 - 1)),
    )


@given(requests())
def test_a_tensor_header_comes_back_as_it_was(request: TensorRequest) -> None:
    message = headers.request_to_proto(request)
    assert headers.request_from_proto(pb.TensorHeader.FromString(message.SerializeToString())) == request


@given(specs(), st.integers(0, 5), st.text(max_size=5), st.integers(0, 9), st.integers(0, 9))
def test_a_result_header_comes_back_as_it_was(
    spec: TensorSpec, index: int, name: str, block: int, first: int
) -> None:
    result = ResultSpec(index, name, spec, block, first)
    message = pb.ResultHeader.FromString(headers.result_to_proto(7, result).SerializeToString())
    assert message.tensor_id == 7
    assert headers.result_from_proto(message, spec.data_format) == result


@given(
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
    st.lists(MILLISECONDS, min_size=6, max_size=6),
)
def test_a_report_comes_back_as_it_was(algorithms: dict[str, str], numbers: list[int]) -> None:
    total, receive, compute, send = (number / 1e6 for number in numbers[:4])
    report = TensorReport("b", algorithms, numbers[4], total, receive, compute, send, numbers[5])
    back = headers.report_from_proto(
        pb.TensorDone.FromString(headers.report_to_proto(3, report).SerializeToString())
    )
    assert back == report


def header(**changes: Any) -> pb.TensorHeader:
    message = pb.TensorHeader(
        data_type=pb.DATA_TYPE_FLOAT32,
        sample_shape=pb.SampleShape(channels=2, rows=3, rest=[4]),
        samples=1,
        band_rows=1,
    )
    message.MergeFrom(pb.TensorHeader(**changes))
    return message


def shape(*sizes: int) -> pb.SampleShape:
    return pb.SampleShape(channels=sizes[0], rows=sizes[1], rest=sizes[2:])


def test_what_a_header_leaves_out_means_its_default() -> None:
    request = headers.request_from_proto(header())
    assert request.spec == TensorSpec(FLOAT32, SampleShape(2, 3, (4,)), 1, 1, DataFormat.CHANNELS_FIRST)
    assert (request.out_dtype, request.precision, request.timeout_ms) == (None, Precision.HIGH, 0)
    whole = header()
    whole.band_rows = 0
    assert headers.request_from_proto(whole).spec.band_rows == 3


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (header(data_type=77), "UNKNOWN_DATA_TYPE"),
        (pb.TensorHeader(sample_shape=shape(1, 1), samples=1, band_rows=1), "UNKNOWN_DATA_TYPE"),
        (header(output_data_type=77), "UNKNOWN_DATA_TYPE"),
        (header(data_format=9), "INVALID_PARAMETER"),
        (header(precision=9), "INVALID_PARAMETER"),
        (pb.TensorHeader(data_type=pb.DATA_TYPE_FLOAT32, samples=1, band_rows=1), "INVALID_SHAPE"),
        (
            pb.TensorHeader(data_type=pb.DATA_TYPE_FLOAT32, sample_shape=shape(0, 3), samples=1),
            "INVALID_SHAPE",
        ),
        (
            pb.TensorHeader(data_type=pb.DATA_TYPE_FLOAT32, sample_shape=shape(1, 0), samples=1),
            "INVALID_SHAPE",
        ),
        (
            pb.TensorHeader(data_type=pb.DATA_TYPE_FLOAT32, sample_shape=shape(1, 1, 0), samples=1),
            "INVALID_SHAPE",
        ),
        (
            pb.TensorHeader(data_type=pb.DATA_TYPE_FLOAT32, sample_shape=shape(1, 1, 1, 1, 1), samples=1),
            "INVALID_SHAPE",
        ),
        (
            pb.TensorHeader(data_type=pb.DATA_TYPE_FLOAT32, sample_shape=shape(MAX_SIZE + 1, 1), samples=1),
            "INVALID_SHAPE",
        ),
        (
            pb.TensorHeader(
                data_type=pb.DATA_TYPE_FLOAT32, sample_shape=shape(1, MAX_SIZE, MAX_SIZE, MAX_SIZE), samples=1
            ),
            "SIZE_OVERFLOW",
        ),
        (header(samples=2**63), "SIZE_OVERFLOW"),
        (header(band_rows=2**63), "SIZE_OVERFLOW"),
        (
            pb.TensorHeader(
                data_type=pb.DATA_TYPE_FLOAT32,
                sample_shape=pb.SampleShape(channels=1),
                samples=2,
                band_rows=1,
            ),
            "INVALID_SHAPE",
        ),
        (
            pb.TensorHeader(
                data_type=pb.DATA_TYPE_FLOAT32,
                sample_shape=pb.SampleShape(channels=1),
                samples=1,
                band_rows=2**62,
            ),
            "SIZE_OVERFLOW",
        ),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(message: pb.TensorHeader, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        headers.request_from_proto(message)
    assert caught.value.reason == reason
    assert caught.value.field


@given(cases())
def test_a_network_comes_back_as_it_was(case: Case) -> None:
    network = Network([Node("a", case.layer), Node("b", Activation("gelu"), ("a",))], {"x": "b", "y": "a"})
    message = pb.InlineNetwork.FromString(networks.inline_to_proto(network).SerializeToString())
    weights = {tensor.digest: tensor for tensor in map(carried.weight_from_proto, message.weights)}
    assert set(weights) == {tensor.digest for tensor in network.tensors}
    back = networks.network_from_proto(message.network, lambda tensor: weights[tensor.digest])
    assert back.canonical() == network.canonical()
    assert back.name == network.name
    first, again = network.nodes[0].layer, back.nodes[0].layer
    assert isinstance(first, Conv)
    assert isinstance(again, Conv)
    assert first.weight.tobytes() == again.weight.tobytes()
    assert repr(first) == repr(again)


@given(fitted())
def test_every_layer_comes_back_as_it_was(case: Fitted) -> None:
    inputs = (INPUT,) * case.layer.fewest_inputs
    network = Network([Node("a", case.layer, inputs), Node("b", Add("relu"), ("a", "a", "a"))], {"x": "b"})
    message = pb.InlineNetwork.FromString(networks.inline_to_proto(network).SerializeToString())
    weights = {tensor.digest: tensor for tensor in map(carried.weight_from_proto, message.weights)}
    back = networks.network_from_proto(message.network, lambda tensor: weights[tensor.digest])
    assert back.canonical() == network.canonical()
    layer = back.nodes[0].layer
    assert type(layer) is type(case.layer)
    assert repr(layer) == repr(case.layer)
    assert layer.rank == case.layer.rank
    assert layer.output_sample(case.sample) == case.layer.output_sample(case.sample)
    assert [one.digest for one in layer.tensors] == [one.digest for one in case.layer.tensors]


@given(cases())
def test_a_structure_alone_has_the_name_but_no_values(case: Case) -> None:
    network = Network([case.layer])
    back = networks.network_from_proto(networks.network_to_proto(network))
    assert back.name == network.name
    assert back.output_shape is not None
    with pytest.raises(NetworkNotFound, match="are not here"):
        _ = back.tensors[0].array


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_activation_travels(function: str) -> None:
    network = Network([Activation(function, -0.125)])
    assert networks.network_from_proto(networks.network_to_proto(network)).name == network.name


def conv_node(**changes: Any) -> pb.Network:
    """A network of one convolution, whose fields `changes` sets."""
    tensor = Tensor.of(np.ones((2, 1, 3, 3), np.float32))
    conv = networks.network_to_proto(Network([Conv(tensor)])).nodes[0].conv
    for name, value in changes.items():
        conv.ClearField(name)  # type: ignore[arg-type]
        conv.MergeFrom(pb.Conv(**{name: value}))
    return pb.Network(
        nodes=[pb.Node(id="n", inputs=["input"], conv=conv)], outputs=[pb.NetworkOutput(name="o", node="n")]
    )


def test_what_a_convolution_leaves_out_means_its_default() -> None:
    plain = conv_node()
    bare = conv_node()
    for name in ("stride", "dilation", "padding", "groups", "padding_mode", "activation"):
        bare.nodes[0].conv.ClearField(name)
    assert networks.network_from_proto(bare).name == networks.network_from_proto(plain).name
    layer = networks.network_from_proto(bare).nodes[0].layer
    assert isinstance(layer, Conv)
    assert (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
    assert (layer.padding, layer.padding_mode) == (((0, 0), (0, 0)), PaddingMode.ZEROS)


def pool_node(**fields: Any) -> pb.Network:
    """A network of one pooling of windows of 2, whose fields are set."""
    given: dict[str, Any] = {"kernel_size": [2], **fields}
    pool = pb.MaxPool(**given)
    return pb.Network(
        nodes=[pb.Node(id="n", inputs=["input"], max_pool=pool)],
        outputs=[pb.NetworkOutput(name="o", node="n")],
    )


def padding(*pairs: tuple[int, int]) -> pb.Padding:
    axes = [pb.AxisPadding(before=before, after=after) for before, after in pairs]
    return pb.Padding(explicit=pb.ExplicitPadding(axes=axes))


def test_what_a_pooling_leaves_out_means_its_default() -> None:
    layer = networks.network_from_proto(pool_node()).nodes[0].layer
    assert isinstance(layer, MaxPool)
    assert layer.rank is None
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == (2, 2, 0, 1)
    message = pool_node(rank=2, kernel_size=[2, 3])
    layer = networks.network_from_proto(message).nodes[0].layer
    assert isinstance(layer, MaxPool)
    assert layer.rank == 2
    assert (layer.stride, layer.padding, layer.dilation) == ((2, 3), ((0, 0), (0, 0)), (1, 1))
    mean = pb.Network(
        nodes=[pb.Node(id="n", inputs=["input"], avg_pool=pb.AvgPool(kernel_size=[2]))],
        outputs=message.outputs,
    )
    means = networks.network_from_proto(mean).nodes[0].layer
    assert isinstance(means, AvgPool)
    assert means.count_include_pad


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 4, "kernel_size": [1, 1, 1, 1]},
        {"rank": 2},
        {"kernel_size": []},
        {"kernel_size": [2, 2]},
        {"kernel_size": [0]},
        {"stride": [1, 1]},
        {"stride": [0]},
        {"dilation": [1, 1]},
        {"rank": 1, "dilation": [0]},
        {"padding": padding((0, 1))},
        {"padding": padding((1, 1), (1, 1))},
        {"rank": 1, "padding": padding((1, 1), (1, 1))},
        {"kernel_size": [2**32 - 1]},
    ],
)
def test_a_pooling_that_breaks_a_rule_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        networks.network_from_proto(pool_node(**fields))
    assert caught.value.reason == "INVALID_PARAMETER"
    assert caught.value.metadata["node"] == "n"


def test_padding_as_wide_as_the_window_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"is \(2, 2\) and the window spans 2") as caught:
        networks.network_from_proto(pool_node(padding=padding((2, 2))))
    assert caught.value.reason == "PADDING_TOO_LARGE"


def test_same_padding_says_nothing_of_a_transposed_convolution() -> None:
    network = networks.network_to_proto(Network([ConvTranspose(np.ones((1, 1, 3), np.float32))]))
    network.nodes[0].conv_transpose.padding.same.SetInParent()
    with pytest.raises(InvalidRequest, match="'same' says nothing") as caught:
        networks.network_from_proto(network)
    assert caught.value.field == "padding"


@pytest.mark.parametrize("inputs", [[], ["input"], ["input"] * 65])
def test_a_sum_of_too_few_or_too_many_is_refused(inputs: list[str]) -> None:
    message = pb.Network(
        nodes=[pb.Node(id="n", inputs=inputs, add=pb.Add())], outputs=[pb.NetworkOutput(name="o", node="n")]
    )
    with pytest.raises(InvalidRequest, match=f"takes 2 to 64 inputs, not {len(inputs)}") as caught:
        networks.network_from_proto(message)
    assert caught.value.reason == "INVALID_NETWORK"


@pytest.mark.parametrize("name", ["locally_connected", "conv_transpose", "linear"])
def test_a_layer_without_its_weight_is_refused(name: str) -> None:
    kind: Any = {
        "locally_connected": pb.LocallyConnected,
        "conv_transpose": pb.ConvTranspose,
        "linear": pb.Linear,
    }[name]
    message = pb.Network(
        nodes=[pb.Node(id="n", inputs=["input"], **{name: kind()})],
        outputs=[pb.NetworkOutput(name="o", node="n")],
    )
    with pytest.raises(InvalidRequest, match=r"layer 0 \(id 'n'\): .* needs a weight") as caught:
        networks.network_from_proto(message)
    assert caught.value.reason == "INVALID_NETWORK"


@given(st.integers(1, MAX_SIZE))
def test_a_vectors_shape_comes_back_as_it_was(features: int) -> None:
    sample = SampleShape.of_vector(features)
    message = pb.SampleShape.FromString(headers.sample_to_proto(sample).SerializeToString())
    assert headers.sample_from_proto(message) == sample


@pytest.mark.parametrize(
    "message",
    [
        pb.SampleShape(vector=True),
        pb.SampleShape(vector=True, channels=MAX_SIZE + 1),
        pb.SampleShape(vector=True, channels=3, rows=2),
        pb.SampleShape(vector=True, channels=3, rest=[1]),
    ],
)
def test_a_vector_with_axes_or_without_features_is_refused(message: pb.SampleShape) -> None:
    with pytest.raises(InvalidRequest, match="a vector has 1 to") as caught:
        headers.sample_from_proto(message)
    assert caught.value.reason == "INVALID_SHAPE"


def reference(
    digest: bytes = bytes(32), data_type: int = 1, sizes: tuple[int, ...] = (2, 1, 3, 3)
) -> pb.TensorReference:
    return pb.TensorReference(digest=digest, data_type=pb.DataType.ValueType(data_type), shape=sizes)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pb.Network(), "INVALID_NETWORK"),
        (
            pb.Network(nodes=[pb.Node(id="a", inputs=["input"], activation=pb.Activation())]),
            "INVALID_NETWORK",
        ),
        (
            pb.Network(
                nodes=[pb.Node(id="a", inputs=["input"], activation=pb.Activation())],
                outputs=[pb.NetworkOutput(name="o", node="a")] * 2,
            ),
            "INVALID_NETWORK",
        ),
        (
            pb.Network(
                nodes=[pb.Node(id="a", inputs=["input"])], outputs=[pb.NetworkOutput(name="o", node="a")]
            ),
            "UNKNOWN_LAYER",
        ),
        (conv_node(stride=[0, 1]), "INVALID_PARAMETER"),
        (conv_node(stride=[1]), "INVALID_PARAMETER"),
        (conv_node(stride=[2**32 - 1, 1]), "INVALID_PARAMETER"),
        (conv_node(dilation=[1, 1, 1]), "INVALID_PARAMETER"),
        (conv_node(groups=3), "CHANNEL_MISMATCH"),
        (conv_node(padding_mode=17), "INVALID_PARAMETER"),
        (conv_node(activation=pb.Activation(function=99)), "INVALID_PARAMETER"),  # type: ignore[arg-type]
        (conv_node(activation=pb.Activation(function=4, negative_slope=float("nan"))), "INVALID_PARAMETER"),  # type: ignore[arg-type]
        (
            conv_node(padding=pb.Padding(explicit=pb.ExplicitPadding(axes=[pb.AxisPadding(before=1)]))),
            "INVALID_PARAMETER",
        ),
        (conv_node(bias=reference(sizes=(3,))), "INVALID_SHAPE"),
        (conv_node(bias=reference(sizes=(2,), data_type=2)), "DATA_TYPE_MISMATCH"),
        (conv_node(weight=reference(digest=b"short")), "INVALID_NETWORK"),
        (conv_node(weight=reference(data_type=0)), "UNKNOWN_DATA_TYPE"),
        (conv_node(weight=reference(data_type=5)), "INVALID_SHAPE"),
        (conv_node(weight=reference(sizes=())), "INVALID_SHAPE"),
        (conv_node(weight=reference(sizes=(2, 0, 3))), "INVALID_SHAPE"),
        (conv_node(weight=reference(sizes=(1, 1, 1, 1, 1, 1))), "INVALID_SHAPE"),
        (conv_node(weight=reference(sizes=(2**31, 1, 1))), "INVALID_SHAPE"),
        (conv_node(weight=reference(sizes=(2**30, 2**30, 2**30))), "SIZE_OVERFLOW"),
    ],
)
def test_a_network_that_breaks_a_rule_is_refused(message: pb.Network, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        networks.network_from_proto(message)
    assert caught.value.reason == reason


def test_a_convolution_without_a_weight_is_refused() -> None:
    message = conv_node()
    message.nodes[0].conv.ClearField("weight")
    with pytest.raises(InvalidRequest, match=r"layer 0 \(id 'n'\): a convolution needs a weight") as caught:
        networks.network_from_proto(message)
    assert caught.value.metadata["node"] == "n"


@pytest.mark.parametrize("size", [0, 35, 37])
def test_weights_of_another_size_are_refused(size: int) -> None:
    message = pb.WeightTensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[1, 1, 9], data=bytes(size))
    with pytest.raises(InvalidRequest, match=f"has 36 bytes, {size} were sent") as caught:
        carried.weight_from_proto(message)
    assert caught.value.reason == "PAYLOAD_SIZE"


VALID = networks.network_to_proto(every_layer(FLOAT32)).SerializeToString()


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(VALID)),
)
def test_any_bytes_are_a_network_or_refused(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(VALID)
    for at, byte in changes:
        data[at] = byte
    with suppress(DecodeError, InvalidRequest):
        networks.network_from_proto(pb.Network.FromString(bytes(data[: length or None])))
