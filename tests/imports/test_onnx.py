"""Networks from ONNX files, against ONNX's own reference evaluator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import convservice
from convservice import Activation, Add, Conv, InvalidRequest, Linear, MissingPackage, Network
from convservice_backends.interface import Backend
from tests.helpers import Array, compute

onnx: Any = import_module("onnx")  # not all of it has annotations
helper: Any = import_module("onnx.helper")
to_proto: Any = import_module("onnx.numpy_helper").from_array
ReferenceEvaluator: Any = import_module("onnx.reference").ReferenceEvaluator

OPSET = 20


class Graph:
    """An ONNX graph while it is written: a chain from `x`, and whatever else is added by name."""

    def __init__(self, rng: np.random.Generator, shape: Sequence[int], dtype: str = "float64") -> None:
        self.rng, self.shape, self.dtype = rng, tuple(int(size) for size in shape), dtype
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.end = "x"

    def constant(self, value: Any) -> str:
        """Adds an initializer; hands back its name."""
        name = f"c{len(self.constants)}"
        self.constants.append(to_proto(np.asarray(value), name))
        return name

    def random(self, *shape: int, low: float = -1.0) -> str:
        return self.constant(self.rng.uniform(low, 1, shape).astype(self.dtype))

    def add(self, kind: str, *more: str, first: str | None = None, **attributes: Any) -> str:
        """Adds a node that takes the end of the chain, then `more`, and is the end from now on."""
        name = f"/{kind}_{len(self.nodes)}"
        inputs = [self.end if first is None else first, *more]
        self.nodes.append(helper.make_node(kind, inputs, [f"v{len(self.nodes)}"], name=name, **attributes))
        self.end = f"v{len(self.nodes) - 1}"
        return self.end

    def model(self, outputs: Sequence[str] = ()) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        given = [helper.make_tensor_value_info("x", kind, ["N", *self.shape])]
        results = [helper.make_tensor_value_info(name, kind, None) for name in outputs or (self.end,)]
        graph = helper.make_graph(self.nodes, "g", given, results, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)

    def save(self, folder: Path, outputs: Sequence[str] = ()) -> Path:
        path = folder / "model.onnx"
        onnx.save(self.model(outputs), path)
        return path

    def evaluate(self, x: Array, outputs: Sequence[str] = ()) -> list[Array]:
        model = self.model(outputs)
        for node in model.graph.node:  # VALID is no padding, which earlier evaluators did not know
            kept = [attribute for attribute in node.attribute if attribute.s != b"VALID"]
            del node.attribute[:]
            node.attribute.extend(kept)
        found: list[Array] = ReferenceEvaluator(model).run(None, {"x": x})
        return found


def check(backend: Backend, graph: Graph, folder: Path, samples: int = 2) -> Network:
    """Demands what ONNX's evaluator gives, up to rounding."""
    x = graph.rng.uniform(-1, 1, (samples, *graph.shape)).astype(graph.dtype)
    try:
        (expected,) = graph.evaluate(x)
    except (ValueError, IndexError):  # the evaluator takes wrong sizes of its own in some geometries
        assume(False)
        raise
    network = convservice.load_onnx(graph.save(folder))
    (found,) = compute(backend, network, x).values()
    single = graph.dtype == "float32" or any(node.op_type == "Gelu" for node in graph.nodes)
    close = 1e-5 if single else 1e-12  # the evaluator's Gelu has constants of float32
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=close, atol=close)
    assert network.output_shape(x.shape) == expected.shape
    return network


@st.composite
def windows(draw: st.DrawFn, rank: int, *, dilated: bool = True) -> dict[str, Any]:
    """Attributes of an operator with windows, `kernel_shape` included."""
    kernel = draw(st.lists(st.integers(2, 3), min_size=rank, max_size=rank))
    found: dict[str, Any] = {"kernel_shape": kernel}
    if draw(st.booleans()):
        found["strides"] = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    if dilated and draw(st.booleans()):
        found["dilations"] = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    kind = draw(st.sampled_from(["none", "pads", "VALID", "SAME_UPPER"]))
    if kind == "pads":
        found["pads"] = draw(st.lists(st.integers(0, 1), min_size=2 * rank, max_size=2 * rank))
    elif kind != "none" and "dilations" not in found:
        found["auto_pad"] = kind
    return found


ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Gelu", "Silu", "")


def add_activation(graph: Graph, kind: str) -> None:
    if kind == "Silu":
        before = graph.end
        graph.add("Sigmoid")
        graph.add("Mul", before)
    elif kind:
        attributes: dict[str, Any] = {"alpha": 0.3} if kind == "LeakyRelu" else {}
        graph.add(kind, **attributes)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.data())
def test_a_convolution_of_any_geometry(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    options = data.draw(windows(rank))
    groups = data.draw(st.integers(1, 2))
    graph = Graph(rng, (2 * groups, *rng.integers(5, 9, rank)))
    weight = graph.random(3 * groups, 2, *options["kernel_shape"])
    bias = [graph.random(3 * groups)] if data.draw(st.booleans()) else []
    graph.add("Conv", weight, *bias, group=groups, **options)
    if data.draw(st.booleans()):
        mean, variance = graph.random(3 * groups), graph.random(3 * groups, low=0.1)
        scale = graph.random(3 * groups)
        graph.add("BatchNormalization", scale, graph.random(3 * groups), mean, variance, epsilon=1e-3)
    add_activation(graph, data.draw(st.sampled_from(ACTIVATIONS)))
    network = check(backend, graph, tmp_path_factory.mktemp("onnx"))
    assert [type(node.layer) for node in network.nodes] == [Conv], "folded and fused"


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.data())
def test_a_transposed_convolution_of_any_geometry(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    options = data.draw(windows(rank))
    options.pop("auto_pad", None)
    groups = data.draw(st.integers(1, 2))
    graph = Graph(rng, (2 * groups, *rng.integers(3, 5, rank)))
    steps = zip(options.get("strides", [1] * rank), options.get("dilations", [1] * rank), strict=True)
    added = [data.draw(st.integers(0, max(pair) - 1)) for pair in steps]
    weight = graph.random(2 * groups, 3, *options["kernel_shape"])
    graph.add(
        "ConvTranspose", weight, graph.random(3 * groups), group=groups, output_padding=added, **options
    )
    statistics = [graph.random(3 * groups) for _ in range(3)]
    graph.add("BatchNormalization", *statistics, graph.random(3 * groups, low=0.1))
    add_activation(graph, data.draw(st.sampled_from(ACTIVATIONS)))
    network = check(backend, graph, tmp_path_factory.mktemp("onnx"))
    assert len(network.nodes) == 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.data())
def test_averages_of_any_geometry(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    graph = Graph(rng, (2, *rng.integers(5, 9, rank)))
    counted = int(data.draw(st.booleans()))
    graph.add("AveragePool", **data.draw(windows(rank, dilated=False)), count_include_pad=counted)
    check(backend, graph, tmp_path_factory.mktemp("onnx"))


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.data())
def test_maxima_of_any_geometry(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, data: st.DataObject
) -> None:
    """With the padding put around the input by hand: the evaluator forgets some of it."""
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {**data.draw(windows(rank)), "auto_pad": "NOTSET"}
    graph, bare = (
        Graph(rng, (2, *[int(size) for size in sizes])) for sizes in [rng.integers(5, 9, rank)] * 2
    )
    graph.add("MaxPool", **options)
    pads: list[int] = options.pop("pads", [0] * 2 * rank)
    bare.add("MaxPool", **options)
    x = rng.uniform(-1, 1, (2, *graph.shape))
    around = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    (expected,) = bare.evaluate(np.pad(x, around, constant_values=-9))
    network = convservice.load_onnx(graph.save(tmp_path_factory.mktemp("onnx")))
    assert np.array_equal(compute(backend, network, x)["v0"], expected)


@pytest.mark.parametrize("size", [7, 8, 9, 10])
@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
def test_pooling_that_rounds_up(
    backend: Backend, tmp_path: Path, rng: np.random.Generator, kind: str, size: int
) -> None:
    graph = Graph(rng, (2, size, size + 1))
    graph.add(kind, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    check(backend, graph, tmp_path)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceMax", "GlobalAveragePool", "GlobalMaxPool"])
def test_pooling_of_whole_maps(
    backend: Backend, tmp_path: Path, rng: np.random.Generator, kind: str, keepdims: int
) -> None:
    graph = Graph(rng, (3, 5, 6))
    if kind.startswith("Reduce"):
        graph.add(kind, graph.constant(np.array([-1, 2])), keepdims=keepdims)
    else:
        graph.add(kind)
        if not keepdims:
            graph.add("Squeeze", graph.constant(np.array([2, 3])))
    check(backend, graph, tmp_path)


HEADS = ("Flatten", "Reshape 0,-1", "Reshape -1,60")


@pytest.mark.parametrize("flat", HEADS)
@pytest.mark.parametrize("kind", ["Gemm", "Gemm transB", "MatMul", "MatMul Add", "Gemm alpha beta"])
def test_full_connectivity(
    backend: Backend, tmp_path: Path, rng: np.random.Generator, flat: str, kind: str
) -> None:
    graph = Graph(rng, (3, 4, 5))
    operator, _, shape = flat.partition(" ")
    shapes = [graph.constant(np.array([int(size) for size in shape.split(",")]))] if shape else []
    graph.add(operator, *shapes)
    if kind == "Gemm":
        graph.add("Gemm", graph.random(60, 7))
    elif kind == "Gemm transB":
        graph.add("Gemm", graph.random(7, 60), graph.random(7), transB=1)
    elif kind == "Gemm alpha beta":
        graph.add("Gemm", graph.random(60, 7), graph.random(1, 7), alpha=0.5, beta=-2.0)
    else:
        graph.add("MatMul", graph.random(60, 7))
        if "Add" in kind:
            graph.add("Add", graph.random(7), first=graph.end)
    graph.add("Relu")
    network = check(backend, graph, tmp_path)
    assert isinstance(network.nodes[-1].layer, Linear)
    assert network.nodes[-1].layer.activation.function == "relu"


def test_a_network_of_vectors(backend: Backend, tmp_path: Path, rng: np.random.Generator) -> None:
    graph = Graph(rng, (6,))
    graph.add("Gemm", graph.random(5, 6), graph.random(5), transB=1)
    graph.add("Mul", graph.random(5))
    graph.add("Tanh")
    network = convservice.load_onnx(graph.save(tmp_path))
    x = rng.uniform(-1, 1, (3, 6))
    assert len(network.nodes) == 1
    found = compute(backend, network, x)
    np.testing.assert_allclose(found["v2"], graph.evaluate(x)[0], rtol=1e-12)
    assert (network.rank, network.output_shape((3, 6))) == (0, (3, 5))


def residual(graph: Graph, filters: int, stride: int) -> None:
    """A block of ResNet: convolutions with batch normalization, and a shortcut."""
    before, channels = graph.end, graph.shape[0] if graph.end == "x" else filters // stride

    def convolution(size: int, given: int, step: int) -> None:
        weight = graph.random(filters, given, size, size)
        graph.add("Conv", weight, pads=[size // 2] * 4, strides=[step, step])
        statistics = [graph.random(filters) for _ in range(3)]
        graph.add("BatchNormalization", *statistics, graph.random(filters, low=0.1))

    convolution(3, channels, stride)
    graph.add("Relu")
    convolution(3, filters, 1)
    body = graph.end
    if stride > 1:
        graph.end = before
        convolution(1, channels, stride)
        before = graph.end
    graph.add("Add", before, first=body)
    graph.add("Relu")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_residual_blocks(backend: Backend, tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    graph = Graph(rng, (4, 9, 8), dtype)
    residual(graph, 4, 1)
    residual(graph, 8, 2)
    graph.add("GlobalAveragePool")
    graph.add("Flatten")
    graph.add("Gemm", graph.random(10, 8), graph.random(10), transB=1)
    network = check(backend, graph, tmp_path)
    kinds = [node.layer.type_name for node in network.nodes]
    assert kinds == [
        "Conv",
        "Conv",
        "Add",
        "Conv",
        "Conv",
        "Conv",
        "Add",
        "GlobalAvgPool",
        "Flatten",
        "Linear",
    ]


def gelu(graph: Graph, order: str, root: float = 2**0.5) -> None:
    """GELU as the exporters write it out where the opset has none."""
    before = graph.end
    half, one = graph.constant(np.array(0.5, graph.dtype)), graph.constant(np.array([1.0], graph.dtype))
    if "product" in order:
        graph.add("Mul", graph.constant(np.array(1 / root, graph.dtype)))
    else:
        graph.add("Div", graph.constant(np.array(root, graph.dtype)))
    graph.add("Erf")
    graph.add("Add", one)
    if "gate first" in order:
        graph.add("Mul", half)
        graph.add("Mul", before)
    else:
        graph.add("Mul", before)
        graph.add("Mul", half)


@pytest.mark.parametrize("order", ["gate first", "half last", "product, gate first", "product, half last"])
def test_gelu_written_out(backend: Backend, tmp_path: Path, rng: np.random.Generator, order: str) -> None:
    graph = Graph(rng, (2, 6, 5), "float32")  # the evaluator's Erf is of float32 whatever it is given
    gelu(graph, order)
    graph.add("Conv", graph.random(3, 2, 3, 3))
    gelu(graph, order)
    graph.add("Conv", graph.random(2, 3, 1, 1))
    network = check(backend, graph, tmp_path)
    found = [(node.layer.type_name, getattr(node.layer, "activation", None)) for node in network.nodes]
    assert found == [("Activation", None), ("Conv", Activation("gelu")), ("Conv", Activation())]


def test_what_is_nearly_gelu_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    graph = Graph(rng, (2, 6, 5))
    gelu(graph, "gate first", root=1.5)
    with pytest.raises(InvalidRequest, match=r"node 4 \(Mul.*x with 1 \+ Erf\(x / sqrt 2\), GELU, are known"):
        convservice.load_onnx(graph.save(tmp_path))
    graph = Graph(rng, (2, 6, 5))
    graph.add("Erf")
    with pytest.raises(InvalidRequest, match=r"node 0 \(Erf.*the error function is known within GELU"):
        convservice.load_onnx(graph.save(tmp_path))


def test_a_convolution_divided(backend: Backend, tmp_path: Path, rng: np.random.Generator) -> None:
    graph = Graph(rng, (2, 6, 5))
    graph.add("Conv", graph.random(3, 2, 3, 3), graph.random(3))
    graph.add("Div", graph.random(3, 1, 1, low=0.5))
    assert len(check(backend, graph, tmp_path).nodes) == 1


def test_what_other_nodes_read_is_not_changed(
    backend: Backend, tmp_path: Path, rng: np.random.Generator
) -> None:
    """A map that two nodes read keeps its values: nothing after it is folded or fused into it."""
    graph = Graph(rng, (2, 6, 7))
    first = graph.add("Conv", graph.random(3, 2, 1, 1))
    rectified = graph.add("Relu")
    scaled = graph.add("BatchNormalization", *[graph.random(3, low=0.1) for _ in range(4)], first=first)
    graph.add("Identity", first=first)
    added = graph.add("Add", rectified)
    graph.add("Sum", added, scaled, first=first)
    network = check(backend, graph, tmp_path)
    assert sum(isinstance(node.layer, Conv) for node in network.nodes) == 2, "the second is the normalization"


def test_a_normalization_without_a_variance_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    graph = Graph(rng, (2, 6, 7))
    graph.add("Conv", graph.random(3, 2, 1, 1))
    variance = graph.constant(np.array([1, -1, 1], graph.dtype))
    graph.add("BatchNormalization", *[graph.random(3) for _ in range(3)], variance, epsilon=1e-3)
    with pytest.raises(InvalidRequest, match=r"BatchNormalization.*not above 0"):
        convservice.load_onnx(graph.save(tmp_path))


def test_several_outputs_keep_their_names(backend: Backend, tmp_path: Path, rng: np.random.Generator) -> None:
    graph = Graph(rng, (2, 6, 7))
    first = graph.add("Conv", graph.random(3, 2, 3, 3))
    second = graph.add("MaxPool", kernel_shape=[2, 2])
    network = convservice.load_onnx(graph.save(tmp_path, [first, second, first]))
    x = rng.uniform(-1, 1, (1, 2, 6, 7))
    found = compute(backend, network, x)
    assert list(found) == [first, second, f"{first}_2"]
    for name, expected in zip((first, second), graph.evaluate(x, [first, second]), strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-12)


def test_a_normalization_of_the_input(backend: Backend, tmp_path: Path, rng: np.random.Generator) -> None:
    graph = Graph(rng, (3, 6, 7))
    graph.add("Add", graph.constant(rng.uniform(size=(1, 3, 1, 1))))
    graph.add("Mul", graph.constant(rng.uniform(size=(3, 1, 1))))
    graph.add("Dropout")
    graph.add("Conv", graph.random(2, 3, 3, 3))
    network = check(backend, graph, tmp_path)
    first = network.nodes[0].layer
    assert isinstance(first, Conv)
    assert (first.groups, first.kernel) == (3, (1, 1))


def test_same_lower_pads_before(backend: Backend, tmp_path: Path, rng: np.random.Generator) -> None:
    graph = Graph(rng, (2, 7))
    graph.add("Conv", graph.random(3, 2, 4), auto_pad="SAME_LOWER")
    check(backend, graph, tmp_path)
    layer = convservice.load_onnx(graph.save(tmp_path)).nodes[0].layer
    assert isinstance(layer, Conv)
    assert layer.padding == ((2, 1),)


def test_constants_from_nodes_and_names_of_layers(tmp_path: Path, rng: np.random.Generator) -> None:
    graph = Graph(rng, (1, 5, 5))
    weight = helper.make_tensor("w", onnx.TensorProto.DOUBLE, [1, 1, 2, 2], [1.0, 2, 3, 4])
    graph.nodes.append(helper.make_node("Constant", [], ["w"], value=weight))
    graph.add("Conv", "w")
    graph.add("Add", graph.add("Relu"))
    network = convservice.load_onnx(graph.save(tmp_path))
    assert [node.id for node in network.nodes] == ["Conv_1", "Add_3"]
    assert isinstance(network.nodes[1].layer, Add)
    assert network.nodes[1].inputs == ("Conv_1", "Conv_1")


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "operator": ("Softmax", {"axis": 1}, r"node 1 \(Softmax, name '/Softmax_1'\): no layer computes Softmax"),
    "auto_pad": (
        "AveragePool",
        {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER", "strides": [2, 2]},
        "auto_pad",
    ),
    "dilations": (
        "AveragePool",
        {"kernel_shape": [2, 2], "dilations": [2, 2]},
        "its attribute dilations is not 1",
    ),
    "unknown": ("Relu", {"upper": 6.0}, "its attribute upper, which is 6.0, is not known here"),
    "approximate": (
        "Gelu",
        {"approximate": "tanh"},
        "approximate is 'tanh', and only 'none' is computed here",
    ),
    "axis": ("Flatten", {"axis": 2}, "its attribute axis is 2, and only 1 is computed here"),
    "missing": ("MaxPool", {}, "its attribute kernel_shape is not given"),
    "domain": ("Relu", {"domain": "com.example"}, r"node 1 \(com\.example\.Relu"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_no_layer_computes_is_named(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    kind, attributes, message = UNSUPPORTED[name]
    graph = Graph(rng, (2, 6, 6))
    graph.add("Conv", graph.random(3, 2, 1, 1))
    graph.add(kind, **attributes)
    path = graph.save(tmp_path)
    with pytest.raises(InvalidRequest, match=message) as caught:
        convservice.load_onnx(path)
    assert caught.value.reason == "UNKNOWN_LAYER"
    assert str(path) in caught.value.message
    assert f"node 1 ({attributes.get('domain', '')}" in caught.value.message


def test_inputs_that_no_layer_takes_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    def refused(
        graph: Graph, message: str, reason: str = "UNKNOWN_LAYER", outputs: Sequence[str] = ()
    ) -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            convservice.load_onnx(graph.save(tmp_path, outputs))
        assert caught.value.reason == reason

    graph = Graph(rng, (2, 6, 6))
    graph.add("Conv", graph.add("Relu"), first="x")
    refused(graph, r"node 1 \(Conv.*its input 1, 'v0', is no constant")
    graph = Graph(rng, (2, 6, 6))
    graph.add("Mul", graph.add("Tanh"), first="x")
    refused(graph, "it multiplies two feature maps")
    graph = Graph(rng, (2, 6, 6))
    graph.add("Div", graph.add("Tanh"), first=graph.constant(np.array(1.0)))
    refused(graph, r"node 1 \(Div.*it divides by a feature map")
    graph = Graph(rng, (2, 6, 6))
    graph.add("Conv", graph.random(2, 2, 1, 1))
    graph.add("Div", graph.constant(np.array(0.0)))
    refused(graph, "its divisor has a 0")
    graph = Graph(rng, (2, 6, 6))
    graph.add("Add", graph.random(2, 6, 6))
    refused(graph, r"its constant has shape \(2, 6, 6\): one number for each channel is known")
    graph = Graph(rng, (2, 6, 6))
    graph.add("Mul", graph.constant(np.array(1 / 255)))
    graph.add("Relu")
    refused(graph, r"node 0 \(Mul.*scales or shifts what no convolution")
    graph = Graph(rng, (2, 6, 6))
    graph.add("Reshape", graph.constant(np.array([0, 2, -1])))
    refused(graph, r"its shape is \[0, 2, -1\]; only vectors")
    graph = Graph(rng, (2, 6, 6))
    graph.add("ReduceMean", graph.constant(np.array([1])))
    refused(graph, r"its axes are \[1\]; the spatial ones are \[2, 3\]")
    graph = Graph(rng, (2, 6, 6))
    graph.add("Conv", graph.random(2, 2, 3, 3), pads=[-1, 0, 0, 0])
    refused(graph, r"node 0 \(Conv.*padding must be an integer from 0", "INVALID_PARAMETER")
    graph = Graph(rng, (2, 6, 6))
    graph.nodes.append(helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2]))
    refused(graph, "only its first output is computed here, and 'i' is used", outputs=["y", "i"])
    refused(graph, "output 'z' does not depend on the input", "INVALID_NETWORK", outputs=["z"])


def test_a_graph_of_two_inputs(tmp_path: Path) -> None:
    kind = onnx.TensorProto.FLOAT
    given = [helper.make_tensor_value_info(name, kind, [1, 1, 4]) for name in "ab"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        "g",
        given,
        [helper.make_tensor_value_info("y", kind, None)],
    )
    onnx.save(helper.make_model(graph), tmp_path / "two.onnx")
    with pytest.raises(InvalidRequest, match="one input, this graph has 2: 'a', 'b'"):
        convservice.load_onnx(tmp_path / "two.onnx")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        convservice.load_onnx(tmp_path / "missing.onnx")
    path = tmp_path / "photograph.onnx"
    path.write_bytes(b"\x89PNG\r\n" * 20)
    with pytest.raises(InvalidRequest, match=r"photograph\.onnx is no ONNX file, or is damaged") as caught:
        convservice.load_onnx(path)
    assert caught.value.reason == "INVALID_FILE"


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackage, match=r"pip install 'convservice\[onnx\]'") as caught:
        convservice.load_onnx(tmp_path / "x.onnx")
    assert isinstance(caught.value, ImportError)
    assert caught.value.metadata == {"package": "onnx", "extra": "onnx"}


@given(st.integers(0, 2**32 - 1), st.data())
def test_a_damaged_file_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, data: st.DataObject
) -> None:
    graph = Graph(np.random.default_rng(seed), (2, 6, 6))
    graph.add("Conv", graph.random(3, 2, 2, 2), graph.random(3), strides=[2, 1])
    graph.add("Relu")
    path = graph.save(tmp_path_factory.mktemp("onnx"))
    damaged = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        network = convservice.load_onnx(path)
    except InvalidRequest as error:
        refused = error.message
        network = Network([Activation()])
        assert str(path) in refused
    assert {type(node.layer) for node in network.nodes} <= {Conv, Activation}
