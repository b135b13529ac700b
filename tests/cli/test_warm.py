"""Compiling ahead of time, for devices that are not here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import convservice
from convservice.bands import TensorSpec
from convservice.cli.warm import MEMORY_BYTES, PROCESSORS
from convservice.dtypes import dtype_of
from convservice.geometry import SampleShape
from convservice.layers import Activation, Conv
from convservice.network import NAME_PREFIX, Network
from convservice_backends.cuda.algorithms import NAMES, VARIABLE
from convservice_backends.cuda.algorithms.base import every_kernel
from convservice_backends.cuda.device import DeviceInfo
from convservice_backends.cuda.dry import kernels_for
from convservice_backends.cupy import backend
from convservice_backends.cupy.cache import FOLDER_VARIABLE
from tests.cli.conftest import Cli

SMALL = ("8,4,3,3", "--shape", "2,4,20,30", "--architecture", "90")
IMAGE = ("--shape", "1,3,40,30", "--architecture", "90", "--json")
NOWHERE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are kept."""
    kept = tmp_path / "kernels"
    monkeypatch.setenv(FOLDER_VARIABLE, str(kept))
    return kept


@pytest.fixture(autouse=True)
def no_algorithm_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process was started with."""
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def client(target: str) -> Iterator[convservice.ConvClient]:
    """A client of the server, where nothing is left registered."""
    with convservice.connect(target) as connected:
        yield connected
        for name in connected.networks():
            connected.unregister(name)


@pytest.fixture
def registered(client: convservice.ConvClient, rng: np.random.Generator) -> Network:
    """A network on the server, whose layers need kernels of their own, with geometry of every kind."""
    first = Conv(
        rng.standard_normal((32, 3, 3, 3), np.float32),
        rng.standard_normal(32, np.float32),
        stride=2,
        padding=((1, 2), (0, 1)),
        padding_mode="replicate",
        activation=Activation("leaky_relu", 0.2),
    )
    second = Conv(rng.standard_normal((32, 1, 3, 3), np.float32), padding="same", groups=32)
    return client.register(Network([first, second])).network


def needed(network: Network, shape: tuple[int, ...], dtype: str, out_dtype: str | None = None) -> set[str]:
    """The kernels for the network as it is, its weights included."""
    spec = TensorSpec(dtype_of(dtype), SampleShape(shape[1], shape[2], shape[3:]), shape[0], shape[2])
    device = DeviceInfo("sm_90", 90, PROCESSORS[90], MEMORY_BYTES)
    out = dtype_of(out_dtype) if out_dtype else None
    return {kernel.name for kernel in kernels_for(network, spec, device, out_dtype=out)}


def test_what_was_compiled_is_found(cli: Cli, folder: Path) -> None:
    first = cli("warm", *SMALL, "--json").json
    assert first["compiled"] == len(first["kernels"]) > 0
    assert first["found"] == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(first["kernels"].values())
    assert set(first["kernels"]) <= {kernel.name for kernel in every_kernel()}
    second = cli("warm", *SMALL, "--json").json
    assert (second["compiled"], second["found"]) == (0, first["compiled"])
    assert second["kernels"] == first["kernels"]


def test_as_a_page(cli: Cli, folder: Path) -> None:
    ended = cli("warm", *SMALL)
    assert ended.status == 0
    assert "kernels for sm_90" in ended.out
    assert ended.out.splitlines()[-1].endswith(f"0 were there; in {folder}")


def test_integers_are_widened_first(cli: Cli) -> None:
    floats = cli("warm", *SMALL, "--json").json
    integers = cli("warm", *SMALL, "--dtype", "uint8", "--json").json
    (widening,) = set(integers["kernels"]) - set(floats["kernels"])
    assert "uint8_float32" in widening


def test_filters_from_a_file_and_the_options_of_a_convolution(cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "weight.npy", np.ones((6, 2, 5), np.float16))
    geometry = ("--groups", "2", "--stride", "3", "--padding", "same", "--activation", "gelu")
    ended = cli(
        "warm", tmp_path / "weight.npy", "--shape", "1,4,1000", "--architecture", "80", *geometry, "--json"
    )
    assert ended.status == 0
    assert any("float16" in name for name in ended.json["kernels"])


def test_a_filter_bank_keeps_its_type_beside_integers(cli: Cli, tmp_path: Path) -> None:
    weight = np.ones((8, 4, 3, 3), np.float16)
    np.save(tmp_path / "weight.npy", weight)
    ended = cli("warm", tmp_path / "weight.npy", *SMALL[1:], "--dtype", "uint8", "--json")
    assert set(ended.json["kernels"]) == needed(Network([Conv(weight)]), (2, 4, 20, 30), "uint8")


def test_whole_numbers_in_a_file_are_filters_of_the_inputs_type(cli: Cli, tmp_path: Path) -> None:
    weight = np.ones((8, 4, 3, 3), np.int64)
    np.save(tmp_path / "weight.npy", weight)
    for dtype, own in (("float16", "float16"), ("int8", "float32")):
        ended = cli("warm", tmp_path / "weight.npy", *SMALL[1:], "--dtype", dtype, "--json")
        network = Network([Conv(weight.astype(own))])
        assert set(ended.json["kernels"]) == needed(network, (2, 4, 20, 30), dtype)
    ended = cli("warm", tmp_path / "weight.npy", *SMALL[1:])
    assert (ended.status, "dtype int64 is not supported" in ended.err) == (2, True)
    np.save(tmp_path / "weight.npy", weight.astype("S1"))
    ended = cli("warm", tmp_path / "weight.npy", *SMALL[1:], "--dtype", "float32")
    assert (ended.status, "weight.npy holds |S1" in ended.err) == (2, True)


def test_a_result_of_another_type(cli: Cli) -> None:
    own = cli("warm", *SMALL, "--json").json["kernels"]
    other = cli("warm", *SMALL, "--out-dtype", "float16", "--json").json["kernels"]
    assert any("float16" in name for name in other)
    assert not any("float16" in name for name in own)


def test_all_layers_of_a_registered_network(cli: Cli, target: str, registered: Network) -> None:
    ended = cli("warm", registered.name, "--target", target, *IMAGE)
    assert set(ended.json["kernels"]) == needed(registered, (1, 3, 40, 30), "float32")
    assert ended.json["compiled"] == len(ended.json["kernels"]) > 2
    narrow = ("--dtype", "uint8", "--out-dtype", "float16", "--timeout", "60")
    ended = cli("warm", registered.name, "--target", target, *narrow, *IMAGE)
    assert set(ended.json["kernels"]) == needed(registered, (1, 3, 40, 30), "uint8", "float16")
    assert ended.json["found"] > 0


def test_all_layers_of_a_network_in_a_file(cli: Cli, tmp_path: Path, rng: np.random.Generator) -> None:
    layers = [
        Conv(rng.standard_normal((16, 3, 5, 5)).astype(np.float16), stride=2),
        Activation("silu"),
    ]
    path = tmp_path / "edges.safetensors"
    convservice.save(Network(layers), path)
    ended = cli("warm", path, *IMAGE)
    assert set(ended.json["kernels"]) == needed(Network(layers), (1, 3, 40, 30), "float16")
    for options, message in {
        ("--target", NOWHERE): f"no server is asked about the file {path}",
        ("--stride", "2"): f"have their own stride, padding and so on: {path} takes no --stride",
    }.items():
        ended = cli("warm", path, *IMAGE[:-1], *options)
        assert (ended.status, message in ended.err) == (2, True)


def test_a_file_that_holds_no_network(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "edges.safetensors"
    ended = cli("warm", path, *IMAGE[:-1])
    assert (ended.status, f"cannot read {path}: No such file" in ended.err) == (2, True)
    path.write_bytes(b"PNG")
    ended = cli("warm", path, *IMAGE[:-1])
    assert (ended.status, f"{path} is no network file, or is damaged" in ended.err) == (2, True)


def test_a_registered_network_of_another_type_than_float32(
    cli: Cli, target: str, client: convservice.ConvClient, rng: np.random.Generator
) -> None:
    network = Network([Conv(rng.standard_normal((16, 3, 3, 3)).astype(np.float16))])
    ended = cli("warm", client.register(network).name, "--target", target, *IMAGE)
    assert set(ended.json["kernels"]) == needed(network, (1, 3, 40, 30), "float16")


def test_a_registered_network_without_weights(cli: Cli, target: str, client: convservice.ConvClient) -> None:
    name = client.register(Activation("gelu")).name
    ended = cli("warm", name, "--target", target, "--shape", "1,3,40", "--architecture", "90", "--json")
    assert set(ended.json["kernels"]) == needed(Network([Activation("gelu")]), (1, 3, 40), "float32")
    vectors = cli("warm", name, "--target", target, "--shape", "3,40", "--architecture", "90", "--json")
    assert vectors.json["kernels"] == ended.json["kernels"]
    ended = cli("warm", name, "--target", target, "--shape", "3", "--architecture", "90")
    assert (ended.status, "--shape must have 2 to 5 sizes" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "1,4,40,30"), "layer 0 (Conv, id 'layer0'): weight has 3 input channels per group"),
        (("--shape", "3,40,30"), "--shape must have 4 sizes of at least 1, samples first, not (3, 40, 30)"),
        (("--shape", "1,3,40,30", "--dtype", "float16"), "x is float16 and weight is float32"),
    ],
)
def test_an_input_that_a_registered_network_does_not_take(
    cli: Cli, target: str, registered: Network, arguments: tuple[str, ...], message: str
) -> None:
    ended = cli("warm", registered.name, "--target", target, "--architecture", "90", *arguments)
    assert ended.status == 2
    assert message in ended.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "a registered network is fetched from the server that keeps it: networks/sha256-00"),
        (
            ("--target", NOWHERE, "--stride", "1", "--padding-mode", "zeros"),
            2,
            "00 takes no --stride, --padding-mode",
        ),
        (("--target", NOWHERE, "--timeout", "60"), 3, NOWHERE),
    ],
)
def test_a_registered_network_that_cannot_be_fetched(
    cli: Cli, arguments: tuple[str, ...], status: int, message: str
) -> None:
    ended = cli("warm", NAME_PREFIX + "00" * 32, *IMAGE[:-1], *arguments)
    assert ended.status == status
    assert message in ended.err


@pytest.mark.parametrize(("digest", "status"), [("00" * 32, 1), ("00", 2)])
def test_a_network_that_the_server_does_not_know(cli: Cli, target: str, digest: str, status: int) -> None:
    ended = cli("warm", NAME_PREFIX + digest, "--target", target, *IMAGE[:-1])
    assert ended.status == status
    assert NAME_PREFIX in ended.err


def test_a_server_is_for_registered_networks_alone(cli: Cli) -> None:
    ended = cli("warm", *SMALL, "--target", NOWHERE)
    assert ended.status == 2
    assert "no server is asked about the filter bank 8,4,3,3" in ended.err


@pytest.mark.parametrize("algorithm", ["direct", "implicit_gemm"])
def test_the_algorithm_that_the_environment_asks_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    monkeypatch.setenv(VARIABLE, algorithm)
    kernels = cli("warm", *SMALL, "--json").json["kernels"]
    assert {name for name in kernels if name.startswith(NAMES)} == {
        name for name in kernels if name.startswith(algorithm)
    }
    assert any(name.startswith(algorithm) for name in kernels)


def test_an_algorithm_that_there_is_not(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "magic")
    ended = cli("warm", *SMALL)
    assert ended.status == 2
    assert f"{VARIABLE} must be one of {', '.join(NAMES)}, not 'magic'" in ended.err
    monkeypatch.setenv(VARIABLE, "")
    assert cli("warm", *SMALL).status == 0


def test_images_that_come_in_bands(cli: Cli) -> None:
    ended = cli("warm", "4,3,3,3", "--shape", "1,3,3000,4000", "--architecture", "120", "--json")
    assert ended.status == 0
    assert ended.json["compiled"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8,4,3,3", "--shape", "4,20,30"), "--shape must have 4 sizes of at least 1, samples first"),
        (("8,4,3,3", "--shape", "1,3,20,30"), "channels"),
        (("8,4,3,3", "--shape", "1,4,20,30", "--dtype", "complex64"), "complex64"),
        (("nowhere.npy", "--shape", "1,4,20,30"), "cannot read nowhere.npy"),
        (("8,4,3,3", "--shape", "1,4,20,30", "--out-dtype", "int64"), "int64"),
        (("8,4,3,3", "--shape", "1,4,20,30", "--stride", "0"), "stride must be an integer from 1"),
    ],
)
def test_wrong_arguments(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    ended = cli("warm", *arguments, "--architecture", "90")
    assert ended.status == 2
    assert message in ended.err


def test_a_device_that_no_kernel_can_be_compiled_for(cli: Cli) -> None:
    ended = cli("warm", *SMALL[:3], "--architecture", "60")
    assert ended.status == 1
    assert "compiles for sm_75" in ended.err


def test_a_folder_that_keeps_nothing(cli: Cli, folder: Path) -> None:
    folder.write_bytes(b"")
    ended = cli("warm", *SMALL)
    assert ended.status == 1
    assert f"cannot be kept in {folder}" in ended.err


def test_without_a_gpu_it_says_why_and_what_to_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "DRIVER", "libno-such-driver.so.1")
    ended = cli("warm", *SMALL[:3])
    assert ended.status == 1
    assert "no GPU can be used here: there is no NVIDIA driver here (libno-such-driver.so.1" in ended.err
    assert ended.err.rstrip().endswith("--architecture says for which one to compile")
