"""Networks that PyTorch exports to ONNX: loaded, run on a server, held beside PyTorch in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convservice
from convservice import ConvClient, Network
from convservice.dtypes import FLOAT32
from convservice_backends.reference import layer_reference, network_reference
from tests.helpers import Array, every_map

pytestmark = pytest.mark.torch

try:
    torch: Any = import_module("torch")
    nn: Any = import_module("torch.nn")
    functional: Any = import_module("torch.nn.functional")
except ImportError:  # the tests here are not taken in by any run that has no PyTorch
    torch = nn = functional = None

Exporter = dict[str, Any]
EXPORTERS: dict[str, Exporter] = {
    "opset 18": {"dynamo": True, "opset_version": 18},
    "opset 20": {"dynamo": True, "opset_version": 20},
    "TorchScript": {"dynamo": False, "opset_version": 17},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights every time."""
    torch.manual_seed(11)


def trained(module: Any, *shape: int) -> Any:
    """The module in its evaluation mode, its normalizations with the statistics of random data."""
    for part in module.modules():
        if hasattr(part, "running_mean"):
            part.momentum = None  # the mean over all batches
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    with torch.no_grad():
        for _ in range(2):
            module.train()(torch.randn(shape))
    return module.eval()


def exported(module: Any, x: Array, folder: Path, exporter: Exporter) -> Network:
    """The module by way of a file."""
    path = folder / "model.onnx"
    with warnings.catch_warnings():  # the exporters' own, of PyTorch's parts among each other
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
        given = (torch.from_numpy(x),)
        torch.onnx.export(module, given, path, external_data=False, verbose=False, **exporter)
    return convservice.load_onnx(path)


def in_float64(module: Any, x: Array) -> Array:
    """What PyTorch makes of it; the module has float32 weights again afterwards."""
    with torch.no_grad():
        found: Array = module.double()(torch.from_numpy(x.astype(np.float64))).numpy()
    module.float()
    return found


def remote(client: ConvClient, network: Network, x: Array) -> Array:
    """The one output, from the server."""
    result: Any = client.run(network, x)
    found: Array = result
    return found


def small() -> Any:
    """A CNN with what exporters write in several ways: a normalization, SiLU, GELU, a mean over the map."""

    class Small(nn.Module):  # type: ignore[misc]  # its base is not known to the type checker
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.second, self.third = nn.Conv2d(8, 12, 3, stride=2), nn.Conv2d(12, 12, 3, groups=3)
            self.head = nn.Linear(12, 5)

        def forward(self, x: Any) -> Any:
            x = functional.max_pool2d(torch.relu(self.norm(self.first(x))), 2)
            x = functional.gelu(self.third(functional.silu(self.second(x))))
            return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))

    return trained(Small(), 8, 3, 18, 16)


def lenet() -> Any:
    """LeNet-5, with averages and tanh as it was."""
    return trained(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
            nn.Sequential(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
            nn.Flatten(),
            nn.Sequential(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
        ),
        8, 1, 28, 28,
    )  # fmt: skip


SMALL_ONES: dict[str, tuple[Callable[[], Any], tuple[int, ...], list[str]]] = {
    "small": (
        small,
        (2, 3, 18, 16),
        ["Conv", "MaxPool", "Conv", "Conv", "GlobalAvgPool", "Flatten", "Linear"],
    ),
    "LeNet-5": (
        lenet,
        (2, 1, 28, 28),
        ["Conv", "AvgPool", "Conv", "AvgPool", "Flatten", "Linear", "Linear", "Linear"],
    ),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", SMALL_ONES)
def test_a_small_network_gives_the_same_logits_remotely(
    client: ConvClient, tmp_path: Path, rng: np.random.Generator, name: str, exporter: str
) -> None:
    """Within the bound of the whole network, and layer by layer within each layer's own.

    The normalization that is folded into a convolution rounds that convolution's weights once more; the
    bound, which is for sums in the worst order, has room for that.
    """
    make, shape, kinds = SMALL_ONES[name]
    module, x = make(), rng.normal(size=shape).astype(np.float32)
    network = exported(module, x, tmp_path, EXPORTERS[exporter])
    assert [node.layer.type_name for node in network.nodes] == kinds
    logits = remote(client, network, x)

    (expected,) = network_reference(network, x).values()
    assert not expected.wrong(logits).any()
    exact = in_float64(module, x)
    assert logits.shape == exact.shape
    assert (np.abs(logits - exact) <= expected.bound).all()

    maps = {"input": x, **client.run(every_map(network), x)}
    for node in network.nodes:
        own = layer_reference(node.layer, [maps[source] for source in node.inputs], FLOAT32, FLOAT32)
        assert not own.wrong(maps[node.id]).any(), node.id
    assert np.array_equal(maps[network.nodes[-1].id], logits)


def test_a_batch_of_any_size(client: ConvClient, tmp_path: Path, rng: np.random.Generator) -> None:
    """A file whose batch is not fixed, and one of two samples, both run with three."""
    module, x = lenet(), rng.normal(size=(3, 1, 28, 28)).astype(np.float32)
    free: Exporter = {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    found = remote(client, exported(module, x[:2], tmp_path, free), x)
    fixed = remote(client, exported(module, x[:2], tmp_path, {"dynamo": True}), x)
    assert np.array_equal(found, fixed)
    np.testing.assert_allclose(found, in_float64(module, x), rtol=0, atol=1e-5)


def resnet_18() -> Any:
    """ResNet-18, written out."""

    def convolution(given: int, filters: int, size: int, stride: int = 1) -> list[Any]:
        layer = nn.Conv2d(given, filters, size, stride, size // 2, bias=False)
        return [layer, nn.BatchNorm2d(filters)]

    class Block(nn.Module):  # type: ignore[misc]  # its base is not known to the type checker
        def __init__(self, given: int, filters: int, stride: int) -> None:
            nn.Module.__init__(self)
            first, second = convolution(given, filters, 3, stride), convolution(filters, filters, 3)
            self.body = nn.Sequential(*first, nn.ReLU(), *second)
            self.shortcut = nn.Sequential(*(convolution(given, filters, 1, stride) if stride > 1 else []))

        def forward(self, x: Any) -> Any:
            return torch.relu(self.body(x) + self.shortcut(x))

    kinds = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    kinds += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    return nn.Sequential(
        *convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        *(Block(*kind) for kind in kinds),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000),
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_a_resnet_18_runs_whole(client: ConvClient, tmp_path: Path, rng: np.random.Generator) -> None:
    """At 224 x 224, with an error against float64 of at most four times that of PyTorch in float32."""
    module = trained(resnet_18(), 2, 3, 224, 224)
    x = rng.normal(size=(1, 3, 224, 224)).astype(np.float32)
    network = exported(module, x, tmp_path, {"dynamo": True})
    kinds = [node.layer.type_name for node in network.nodes]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "Conv": 20, "MaxPool": 1, "Add": 8, "GlobalAvgPool": 1, "Flatten": 1, "Linear": 1,
    }  # fmt: skip
    logits = remote(client, network, x)

    with torch.no_grad():
        peer = module(torch.from_numpy(x)).numpy()
    exact = in_float64(module, x)
    assert logits.shape == exact.shape == (1, 1000)
    scale = np.abs(exact).max()
    error, error_of_peer = (float(np.abs(found - exact).max() / scale) for found in (logits, peer))
    assert error <= 4 * error_of_peer, (error, error_of_peer)
    assert logits.argmax() == exact.argmax()


@pytest.mark.timeout(600)
def test_every_convolution_of_a_resnet_18_keeps_its_bound(
    client: ConvClient, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Each of the 20 given the maps that the server made before it; exact sums by PyTorch in float64."""
    module = trained(resnet_18(), 4, 3, 96, 96)
    x = rng.normal(size=(1, 3, 96, 96)).astype(np.float32)
    network = exported(module, x, tmp_path, {"dynamo": True})
    maps = {"input": x, **client.run(every_map(network), x)}
    checked = 0
    for node in network.nodes:
        layer = node.layer
        if not isinstance(layer, convservice.Conv):
            continue
        assert layer.bias is not None, "its normalization's"
        assert layer.padding != "same", "the file states numbers"
        given = [maps[node.inputs[0]], layer.weight, layer.bias]
        numbers = [torch.from_numpy(array.astype(np.float64)) for array in given]
        pads = tuple(before for before, _ in layer.padding)
        z = functional.conv2d(*numbers, layer.stride, pads).numpy()
        magnitude = functional.conv2d(*(one.abs() for one in numbers), layer.stride, pads).numpy()
        exact = np.maximum(z, 0) if layer.activation.function == "relu" else z
        products, unit = layer.weight[0].size, FLOAT32.roundoff
        bound = (
            (products + 3) * unit * magnitude
            + unit * np.abs(exact)
            + (products + 1) * FLOAT32.smallest_normal
        )
        assert (np.abs(maps[node.id] - exact) <= bound).all(), node.id
        checked += 1
    assert checked == 20
