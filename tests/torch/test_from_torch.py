"""Networks from PyTorch modules, up to a ResNet-18, beside what PyTorch makes of them in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import convservice
from convservice import Conv, InvalidRequest, Layer, MissingPackage, Network, Residual
from convservice_backends.interface import Backend
from tests.helpers import Array, compute

pytestmark = pytest.mark.torch

try:
    torch: Any = import_module("torch")
    nn: Any = import_module("torch.nn")
except ImportError:  # the tests here are not taken in by any run that has no PyTorch
    torch = nn = None


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights every time."""
    torch.manual_seed(7)


def settled(module: Any) -> Any:
    """The module in its evaluation mode, with statistics and thresholds that are not those of a new one."""
    for part in module.modules():
        if hasattr(part, "running_mean"):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return module.eval()


def check(backend: Backend, module: Any, x: Array, tolerance: float = 1e-12) -> Network:
    """Demands in float64 what PyTorch gives, up to rounding."""
    module = settled(module).double()
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    network = convservice.from_torch(module)
    found = compute(backend, network, x)["output"]
    assert found.shape == expected.shape == network.output_shape(x.shape)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)
    return network


MODULES: dict[str, tuple[Callable[[], Any], tuple[int, ...], list[str]]] = {
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2), nn.BatchNorm2d(6), nn.ReLU()
        ),
        (2, 4, 9, 8),
        ["Conv"],
    ),
    "same": (lambda: nn.Conv2d(2, 3, 4, padding="same", padding_mode="reflect"), (1, 2, 6, 7), ["Conv"]),
    "one axis": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.LeakyReLU(0.2), nn.MaxPool1d(2)
        ),
        (2, 2, 13),
        ["Conv", "MaxPool"],
    ),
    "three axes": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.SiLU(), nn.AvgPool3d(2, 1, 1, ceil_mode=True, count_include_pad=False)
        ),
        (1, 1, 4, 5, 6),
        ["Conv", "AvgPool"],
    ),
    "up": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.Conv2d(6, 1, 1),
            nn.Sigmoid(),
        ),
        (2, 4, 5, 4),
        ["ConvTranspose", "Conv"],
    ),
    "normalized first": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)),
        (2, 3, 6, 6),
        ["Conv", "Conv"],
    ),
    "pools": (
        lambda: nn.Sequential(
            nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), nn.AvgPool2d((2, 1), stride=1), nn.AdaptiveMaxPool2d(1)
        ),
        (2, 3, 11, 12),
        ["MaxPool", "AvgPool", "GlobalMaxPool"],
    ),
    "head": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Dropout2d()),
            nn.Identity(),
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Sequential(
                nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
            ),
        ),
        (3, 1, 7, 7),
        ["Conv", "GlobalAvgPool", "Flatten", "Linear", "Linear"],
    ),
    "vectors": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)),
        (4, 6),
        ["Linear"] * 2,
    ),
    "one": (lambda: nn.Sequential(nn.Sigmoid()), (2, 3, 4), ["Activation"]),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_gives_the_same(backend: Backend, name: str, rng: np.random.Generator) -> None:
    make, shape, kinds = MODULES[name]
    network = check(backend, make(), rng.normal(size=shape))
    assert [node.layer.type_name for node in network.nodes] == kinds


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_keep_their_type(dtype: str) -> None:
    module = nn.Conv2d(2, 3, 3).to(getattr(torch, dtype))
    layer = convservice.from_torch(module).nodes[0].layer
    assert isinstance(layer, Conv)
    assert layer.filters.dtype.name == dtype
    assert np.array_equal(layer.weight.astype(np.float64), module.weight.detach().double().numpy())
    module.weight.data[:] = 0
    assert layer.weight.any(), "copied"


def test_layers_are_named_as_the_modules() -> None:
    parts: Any = import_module("collections").OrderedDict(
        features=nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)), head=nn.Conv2d(2, 1, 1)
    )
    network = convservice.from_torch(nn.Sequential(parts))
    assert [node.id for node in network.nodes] == ["features.0", "features.2", "head"]


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "module": (lambda: nn.Softmax(dim=1), "no layer computes it; known are Sequential, AdaptiveAvgPool"),
    "training": (lambda: nn.BatchNorm2d(2).train(), r"call eval\(\) on the module first"),
    "circular": (
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        "its padding_mode is 'circular'",
    ),
    "indices": (lambda: nn.MaxPool2d(2, return_indices=True), "it returns indices"),
    "divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), "its divisor_override is 3"),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((1, 2)), r"its output_size is \(1, 2\), and only 1 is known"),
    "gelu": (lambda: nn.GELU(approximate="tanh"), "its approximate is 'tanh'"),
    "flatten": (lambda: nn.Flatten(2), "it flattens axes 2 to -1"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_no_layer_computes_is_named(name: str) -> None:
    make, message = UNSUPPORTED[name]
    part = make()
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.ReLU(), part))
    with pytest.raises(InvalidRequest, match=message) as caught:
        convservice.from_torch(module)
    assert caught.value.reason == "UNKNOWN_LAYER"
    assert f"module 2 ({type(part).__name__}, name '1.1')" in caught.value.message


def test_what_is_no_module() -> None:
    with pytest.raises(InvalidRequest, match=r"takes a torch\.nn\.Module, not int"):
        convservice.from_torch(3)
    with pytest.raises(InvalidRequest, match="no layer that computes"):
        convservice.from_torch(nn.Sequential(nn.Identity()))

    class Linear(nn.Module):  # type: ignore[misc]  # its base is not known to the type checker
        """A user's own module with a name that is known."""

    with pytest.raises(InvalidRequest, match="no layer computes it"):
        convservice.from_torch(Linear())


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackage, match=r"pip install 'convservice\[torch\]'"):
        convservice.from_torch(None)


def convolution(given: int, filters: int, size: int, stride: int = 1) -> list[Any]:
    layer = nn.Conv2d(given, filters, size, stride, size // 2, bias=False)
    return [layer, nn.BatchNorm2d(filters)]


def blocks() -> list[tuple[Any, Any]]:
    """The eight residual blocks of ResNet-18: body and shortcut."""
    found: list[tuple[Any, Any]] = []
    given = 64
    for filters, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        body = nn.Sequential(
            *convolution(given, filters, 3, stride), nn.ReLU(), *convolution(filters, filters, 3)
        )
        shortcut = nn.Sequential(*(convolution(given, filters, 1, stride) if stride > 1 else []))
        found.append((body, shortcut))
        given = filters
    return found


@pytest.mark.timeout(300)
def test_a_resnet_18_at_224(backend: Backend, rng: np.random.Generator) -> None:
    stem = settled(nn.Sequential(*convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)))
    head = settled(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)))
    middle = [(settled(body), settled(shortcut)) for body, shortcut in blocks()]

    def layers(module: Any) -> list[Layer]:
        return [node.layer for node in convservice.from_torch(module).nodes] if len(module) else []

    parts: list[Layer | Residual] = [
        *layers(stem),
        *(Residual(layers(body), layers(shortcut), activation="relu") for body, shortcut in middle),
        *layers(head),
    ]
    network = Network(parts)
    assert sum(isinstance(node.layer, Conv) for node in network.nodes) == 20
    x = rng.normal(size=(1, 3, 224, 224)).astype(np.float32)
    logits = compute(backend, network, x)["output"]

    with torch.no_grad():
        y = stem.double()(torch.from_numpy(x.astype(np.float64)))
        for body, shortcut in middle:
            y = torch.relu(body.double()(y) + (shortcut.double()(y) if len(shortcut) else y))
        exact = head.double()(y).numpy()
    assert logits.shape == exact.shape == (1, 1000)
    assert np.abs(logits - exact).max() <= 1e-4 * np.abs(exact).max()
    assert logits.argmax() == exact.argmax()
