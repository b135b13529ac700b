"""Networks in files: what comes back, what any reader of the format sees, and every damage refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convservice
from convservice import (
    Activation,
    AvgPool,
    Conv,
    ConvServiceError,
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
    NetworkNotFound,
    Node,
    Residual,
)
from convservice.canonical import LAYERS, network_from_canonical
from convservice.dtypes import FLOAT32, FLOAT64, DType, dtype_of
from convservice.network import MAX_NODES
from convservice.registered import RegisteredNetwork
from convservice.tensorfile import MAX_HEADER_BYTES
from convservice.tensors import Tensor
from tests.helpers import Array, chain, random_array, trunk_with_two_heads
from tests.strategies import Case, cases

safetensors: Any = import_module("safetensors")  # neither has annotations
other_writer: Any = import_module("safetensors.numpy")


def every_layer(rng: np.random.Generator, dtype: DType) -> dict[str, Network]:
    """A network with each layer, with no option at its default."""

    def values(*shape: int) -> Array:
        return random_array(rng, shape, dtype)

    slope = Activation("leaky_relu", 0.1 + 0.2)
    convolutions = [
        Conv(
            values(4, 1, 3, 2),
            values(4),
            stride=(2, 1),
            padding=((1, 0), (2, 3)),
            dilation=(1, 2),
            groups=2,
            padding_mode="reflect",
            activation=slope,
        ),
        Conv(values(3, 4, 5, 5), padding="same", activation="gelu"),
    ]
    options: dict[str, Any] = {"stride": (2, 1), "dilation": (1, 2), "groups": 2, "activation": slope}
    pools = [
        MaxPool((3, 2), stride=2, padding=((1, 0), (0, 1)), dilation=(1, 2), ceil_mode=True),
        MaxPool(3),
        MaxPool(3, padding="same"),
        AvgPool((2, 2), stride=1, padding=1, ceil_mode=True, count_include_pad=False),
        GlobalMaxPool(),
        GlobalAvgPool(),
    ]
    own = [
        LocallyConnected(values(4, 1, 5, 6, 3, 2), values(4, 5, 6), padding=((1, 0), (2, 3)), **options),
        LocallyConnected(values(2, 4, 5, 6, 1, 1), values(2), padding="same"),
    ]
    up = ConvTranspose(
        values(4, 3, 3, 2), values(6), padding=((1, 0), (2, 3)), output_padding=(1, 0), **options
    )
    residual = Residual([Conv(values(2, 2, 3), padding=1)], [Conv(values(2, 2, 1))], activation=slope)
    return {
        "pools": Network(pools),
        "unshared": Network(own),
        "transposed": Network([up, ConvTranspose(values(6, 1, 1, 1))]),
        "residual": Network([residual, Residual([Activation("tanh")])]),
        "head": Network(
            [Flatten(), Linear(values(3, 4), values(3), activation="relu"), Linear(values(2, 3))]
        ),
        "chain": chain(rng, dtype),
        "two heads": trunk_with_two_heads(rng, dtype),
        "convolutions": Network(convolutions),
        "activations": Network([Activation("silu"), slope, Activation("leaky_relu", -0.0)]),
        "one dimension": Network([Conv(values(2, 3, 5), stride=3)]),
        "three dimensions": Network([Conv(values(2, 3, 2, 1, 4), values(2))]),
        "weights twice": Network(
            [Conv(values(2, 2, 1, 1))] * 2 + [Conv(np.zeros((2, 2, 1, 1), dtype.numpy))] * 2
        ),
    }


@pytest.fixture(params=list(every_layer(np.random.default_rng(0), FLOAT32)))
def network(request: pytest.FixtureRequest, rng: np.random.Generator, float_dtype: DType) -> Network:
    return every_layer(rng, float_dtype)[request.param]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "network.safetensors"


def test_a_network_comes_back_as_it_was(network: Network, path: Path) -> None:
    convservice.save(network, path)
    back = convservice.load(path)
    assert (back.name, back.canonical()) == (network.name, network.canonical())
    assert back.outputs == network.outputs
    assert len(back.tensors) == len({tensor.digest for tensor in network.tensors})
    for tensor in back.tensors:
        assert tensor.known_digest is None, "its digest is that of the bytes"
        assert not tensor.array.flags.writeable
        assert tensor.array.flags.c_contiguous
        assert tensor.array.dtype.isnative


@given(cases())
def test_a_convolution_of_any_geometry_comes_back(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    path = tmp_path_factory.mktemp("files") / "one"
    convservice.save(case.layer, path)
    assert convservice.load(path).name == Network([case.layer]).name


def test_the_same_network_gives_the_same_bytes(network: Network, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convservice.save(network, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    convservice.save(convservice.load(tmp_path / "one"), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_other_readers_of_the_format_see_the_weights(
    dtype: str, rng: np.random.Generator, path: Path
) -> None:
    network = trunk_with_two_heads(rng, dtype_of(dtype))
    convservice.save(network, path)
    with safetensors.safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        assert file.metadata().keys() == {"convservice"}
        found = {name: file.get_tensor(name) for name in names}
    for node in network.nodes:
        layer = node.layer
        if isinstance(layer, Conv):
            assert np.array_equal(found[f"{node.id}.weight"], layer.weight)
            if layer.bias is not None:
                assert np.array_equal(found[f"{node.id}.bias"], layer.bias)
    assert len(names) == len(network.tensors)


def test_every_layer_there_is_is_tried(rng: np.random.Generator) -> None:
    tried = [node.layer for network in every_layer(rng, FLOAT32).values() for node in network.nodes]
    assert {layer.canonical()["type"] for layer in tried} == set(LAYERS)
    assert {type(layer) for layer in tried} == leaves(Layer)


def leaves(kind: type) -> set[type]:
    """The classes below `kind` that have none below them."""
    below: list[type] = kind.__subclasses__()
    return {leaf for one in below for leaf in leaves(one)} if below else {kind}


def test_other_readers_see_bfloat16(rng: np.random.Generator, path: Path) -> None:
    convservice.save(Conv(random_array(rng, (2, 1, 3), dtype_of("bfloat16"))), path)
    ((name, entry),) = safetensors.deserialize(path.read_bytes())
    assert (name, entry["dtype"], entry["shape"]) == ("layer0.weight", "BF16", [2, 1, 3])


def test_a_file_that_another_writer_put_in_another_order(rng: np.random.Generator, path: Path) -> None:
    network = chain(rng, FLOAT64)
    convservice.save(network, path)
    with safetensors.safe_open(path, framework="numpy") as file:
        texts, tensors = (
            file.metadata(),
            {f"z{name}": file.get_tensor(name) for name in reversed(file.keys())},
        )
    other_writer.save_file(tensors, path, texts)
    assert convservice.load(path).name == network.name


def test_what_was_there_stays_until_the_new_file_is_complete(
    rng: np.random.Generator, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convservice.save(Conv(np.ones((1, 1, 3), np.float32)), path)
    before = path.read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space left"):
        convservice.save(chain(rng, FLOAT32), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_a_link_still_leads_to_the_file(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    convservice.save(Activation("relu"), link)
    assert link.is_symlink()
    assert convservice.load(path).name == convservice.load(str(link)).name


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        convservice.load(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convservice.save(Activation("relu"), tmp_path / "nowhere" / "x")


def test_a_network_whose_weights_are_elsewhere(path: Path) -> None:
    elsewhere = Tensor.reference(bytes(32), FLOAT32, (1, 1, 3))
    with pytest.raises(NetworkNotFound, match=r"the values of tensor sha256-00.* are not here"):
        convservice.save(RegisteredNetwork(lambda: None, Network([Conv(elsewhere)])), path)
    assert not path.exists()


def test_it_needs_no_package(path: Path) -> None:
    code = f"""
import sys
sys.modules["safetensors"] = None
import numpy as np, convservice
convservice.save(convservice.Conv(np.ones((1, 1, 3), "float32")), {str(path)!r})
print(convservice.load({str(path)!r}).nodes[0].id)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "layer0\n"


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and what follows it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: object, rest: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def refused(path: Path, message: str, reason: str = "INVALID_FILE") -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        convservice.load(path)
    assert caught.value.reason == reason
    assert str(path) in caught.value.message
    assert caught.value.metadata["path"] == str(path)


@pytest.fixture
def saved(rng: np.random.Generator, path: Path) -> Path:
    """A file with a network of two convolutions of one kernel size."""
    layers = [Conv(random_array(rng, (2, 2, 3), FLOAT32)), Conv(random_array(rng, (2, 2, 3), FLOAT32))]
    convservice.save(Network(layers), path)
    return path


def test_a_file_cut_anywhere_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 48, len(data) - 1}:
        saved.write_bytes(data[:length])
        refused(saved, "is no network file, or is damaged")


def test_a_changed_byte_of_a_weight_is_noticed(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    refused(saved, "names weights sha256-.*, which it does not hold")


def test_bytes_after_the_last_tensor_are_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved, "it has 1?[0-9]+ bytes, its header accounts for")


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no JSON": (lambda header: b"{", "its header is no JSON"),
    "deep": (lambda header: b"[" * 100_000, "its header is no JSON"),
    "not UTF-8": (lambda header: b"\xff", "its header is no JSON"),
    "twice": (lambda header: b'{"a": 1, "a": 2}', "its header is no JSON"),
    "a list": (lambda header: [], "its header is no JSON object"),
    "an entry of text": (lambda header: {**header, "layer0.weight": "x"}, "nothing of use about tensor"),
    "no entries": (lambda header: {"__metadata__": header["__metadata__"]}, "its header accounts for"),
    "metadata": (lambda header: {**header, "__metadata__": {"a": 1}}, "its __metadata__ are not texts"),
    "tensors alone": (lambda header: {**header, "__metadata__": {}}, "it holds tensors and no network"),
    "text": (lambda header: {**header, "__metadata__": {"convservice": "{"}}, "in its metadata is no JSON"),
    "deep text": (
        lambda header: {**header, "__metadata__": {"convservice": "[" * 100_000}},
        "in its metadata is no JSON",
    ),
    "no version": (lambda header: {**header, "__metadata__": {"convservice": "{}"}}, "its version is None"),
    "a list of nothing": (
        lambda header: {**header, "__metadata__": {"convservice": "[]"}},
        "its version is None",
    ),
    "true": (
        lambda header: {**header, "__metadata__": {"convservice": '{"version": true}'}},
        "its version is True",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_none(saved: Path, name: str) -> None:
    header, rest = parts(saved)
    change, message = HEADERS[name]
    put(saved, change(header), rest)
    refused(saved, message)


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "integers": ({"dtype": "I32"}, "has type 'I32'; weights are F32, F64, F16, BF16"),
    "no type": ({"dtype": ["F32"]}, "has type"),
    "another type": ({"dtype": "F64"}, "is not where the one before it ends, or not as long"),
    "no shape": ({"shape": 12}, "has no shape of at most 16 sizes"),
    "seventeen axes": ({"shape": [1] * 17}, "has no shape of at most 16 sizes"),
    "a size of zero": ({"shape": [0, 2, 3]}, "has no shape of at most 16 sizes"),
    "a negative size": ({"shape": [-2, 2, -3]}, "has no shape of at most 16 sizes"),
    "a size of 2**62": ({"shape": [2**62, 2, 3]}, "has no shape of at most 16 sizes"),
    "a fraction": ({"shape": [2.0, 2, 3]}, "has no shape of at most 16 sizes"),
    "longer": ({"shape": [2, 2, 4]}, "or not as long"),
    "huge": (
        {"shape": [2**30, 2, 3], "data_offsets": [0, 2**30 * 24]},
        "and tensor 'layer0.weight' would end",
    ),
    "overlapping": ({"data_offsets": [8, 56]}, "is not where the one before it ends"),
    "no place": ({"data_offsets": None}, "is not where the one before it ends"),
    "a place of text": ({"data_offsets": "ab"}, "is not where the one before it ends"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_tensor_that_is_not_as_the_header_says(saved: Path, name: str) -> None:
    header, rest = parts(saved)
    change, message = ENTRIES[name]
    header["layer0.weight"] |= change
    put(saved, header, rest)
    refused(saved, message)


def test_a_header_that_claims_to_be_huge(saved: Path) -> None:
    data = saved.read_bytes()
    for length in (len(data), MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        saved.write_bytes(length.to_bytes(8, "little") + data[8:])
        refused(saved, "does not begin with the length of a header")


def restate(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what a file says of its network."""
    header, rest = parts(path)
    structure = json.loads(header["__metadata__"]["convservice"])
    change(structure)
    header["__metadata__"]["convservice"] = json.dumps(structure)
    put(path, header, rest)


def test_a_later_version_is_refused(saved: Path) -> None:
    restate(saved, lambda structure: structure.update(version=2))
    refused(saved, "is a network file of version 2; this convservice reads up to version 1")


def test_a_layer_of_a_later_version_is_named(saved: Path) -> None:
    restate(saved, lambda structure: structure["network"]["nodes"][1]["layer"].update(type="attention"))
    refused(saved, r"layer 1 \(id 'layer1'\): its type is 'attention'; this version knows", "UNKNOWN_LAYER")


def test_a_member_of_a_later_version_is_refused(saved: Path) -> None:
    restate(saved, lambda structure: structure["network"]["nodes"][0]["layer"].update(rotation=90))
    refused(saved, "layer 0 .*is not what makes one: .*rotation", "INVALID_NETWORK")


def test_another_stride_is_another_network(saved: Path) -> None:
    restate(saved, lambda structure: structure["network"]["nodes"][0]["layer"].update(stride=[2]))
    refused(saved, "it says it is networks/sha256-.*, its content is networks/sha256-")


def test_a_wrong_geometry_is_named(saved: Path) -> None:
    restate(saved, lambda structure: structure["network"]["nodes"][1]["layer"].update(stride=[0]))
    refused(saved, r"layer 1 \(id 'layer1'\): stride must be an integer from 1", "INVALID_PARAMETER")


def test_weights_that_no_layer_uses_are_refused(saved: Path) -> None:
    def without_the_first(structure: dict[str, Any]) -> None:
        only = structure["network"]["nodes"].pop(1)
        structure["network"]["nodes"][0]["layer"]["weight"] = only["layer"]["weight"]
        structure["network"]["outputs"][0]["node"] = "layer0"
        header, _ = parts(saved)
        by_digest = {tensor.digest.hex(): tensor for tensor in convservice.load(saved).tensors}
        assert len(header) == 3
        structure["name"] = network_from_canonical(structure["network"], by_digest.__getitem__).name

    restate(saved, without_the_first)
    refused(saved, "it holds 2 tensors, its structure names 1")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)


@given(st.data())
def test_no_structure_leads_to_another_error(data: st.DataObject) -> None:
    """Any member replaced by any value, or one more of them: a typed error or a network."""
    own = [
        Node("a", Conv(np.ones((1, 1, 3), np.float32), activation="leaky_relu")),
        Node("b", Activation(), ("a",)),
    ]
    network = Network(own)
    by_digest = {tensor.digest.hex(): tensor for tensor in network.tensors}

    def resolve(digest: str) -> Tensor:
        if digest not in by_digest:
            raise InvalidRequest("not here")
        return by_digest[digest]

    form = json.loads(network.canonical())
    with suppress(ConvServiceError):
        network_from_canonical(with_one_replaced(data, form), resolve)


def with_one_replaced(data: st.DataObject, value: Any) -> Any:
    """A JSON value with one value somewhere in it replaced, or one more."""
    if not isinstance(value, dict | list) or data.draw(st.booleans()):
        return data.draw(JSON_VALUES)
    if isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        key = data.draw(st.sampled_from([*members, "more"]))
        return {**members, key: with_one_replaced(data, members.get(key))}
    items = list(cast("Sequence[Any]", value))
    at = data.draw(st.integers(0, len(items)))
    return [*items[:at], with_one_replaced(data, (items[at:] or [None])[0]), *items[at + 1 :]]


@given(st.binary(max_size=64), st.integers(0, 500))
def test_no_bytes_lead_to_another_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    convservice.save(Conv(np.ones((2, 1, 3), np.float32), np.zeros(2, np.float32)), path)
    data = path.read_bytes()
    path.write_bytes(data[:at] + junk + data[at + len(junk) :])
    with suppress(InvalidRequest):
        convservice.load(path)


@pytest.mark.timeout(60)
def test_the_longest_network_fits(path: Path) -> None:
    network = Network([Conv(np.full((1, 1, 3), n, np.float32), padding=1) for n in range(MAX_NODES)])
    convservice.save(network, path)
    assert convservice.load(path).name == network.name
    assert int.from_bytes(path.read_bytes()[:8], "little") < MAX_HEADER_BYTES // 10
