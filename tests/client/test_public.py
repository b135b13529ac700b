"""The names that `import convservice` promises, and what it must not load."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import convservice
from convservice import AsyncConvClient, AsyncRegisteredNetwork, ConvClient, RegisteredNetwork

PROMISED = [
    "Activation",
    "Add",
    "AsyncConvClient",
    "AsyncRegisteredNetwork",
    "AvgPool",
    "BackendInfo",
    "BackendUnavailable",
    "Band",
    "Cancelled",
    "Conv",
    "ConvClient",
    "ConvServiceError",
    "ConvTranspose",
    "DeadlineExceeded",
    "Flatten",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "InternalError",
    "InvalidRequest",
    "Layer",
    "LayerPlan",
    "Limits",
    "Linear",
    "LocallyConnected",
    "MaxPool",
    "MissingPackage",
    "Network",
    "NetworkField",
    "NetworkNotFound",
    "Node",
    "PermissionDenied",
    "Progress",
    "Reason",
    "ReceptiveField",
    "RegisteredNetwork",
    "Residual",
    "ResourceExhausted",
    "SampleShape",
    "ServerInfo",
    "ServiceUnavailable",
    "Summary",
    "TensorReport",
    "Unauthenticated",
    "Usage",
    "__version__",
    "connect",
    "connect_async",
    "from_torch",
    "load",
    "load_onnx",
    "save",
]

GEOMETRY = ["stride", "padding", "dilation", "groups", "padding_mode", "activation"]
OPTIONS = ["data_format", "out_dtype", "precision", "backend", "timeout", "progress", "on_report"]


def public_methods(kind: type) -> dict[str, inspect.Signature]:
    members = inspect.getmembers(kind, callable)
    return {name: inspect.signature(method) for name, method in members if not name.startswith("_")}


def test_all_is_the_promised_names_sorted() -> None:
    assert convservice.__all__ == sorted(PROMISED)
    assert all(hasattr(convservice, name) for name in PROMISED)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_have_the_promised_signature(rank: int) -> None:
    parameters = inspect.signature(getattr(ConvClient, f"conv{rank}d")).parameters
    assert list(parameters) == ["self", "x", "weight", "bias", *GEOMETRY, *OPTIONS]
    defaults = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert defaults == dict.fromkeys([*GEOMETRY, *OPTIONS]) | {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "padding_mode": "zeros",
        "data_format": "channels_first",
        "precision": "high",
    }


@pytest.mark.parametrize(
    ("sync", "other"), [(ConvClient, AsyncConvClient), (RegisteredNetwork, AsyncRegisteredNetwork)]
)
def test_sync_and_async_are_twins(sync: type, other: type) -> None:
    ours, theirs = public_methods(sync), public_methods(other)
    assert ours.keys() == theirs.keys()
    for name, signature in ours.items():
        shape = [(p.name, p.kind, p.default) for p in signature.parameters.values()]
        assert shape == [(p.name, p.kind, p.default) for p in theirs[name].parameters.values()], name


def test_connect_and_connect_async_take_the_same() -> None:
    assert inspect.signature(convservice.connect).parameters.keys() == (
        inspect.signature(convservice.connect_async).parameters.keys()
    )


def test_import_loads_neither_server_nor_backends_nor_extras() -> None:
    code = """
import sys, convservice
unwanted = {"convservice_server", "convservice_backends", "PIL", "rich", "scipy", "ml_dtypes"}
unwanted |= {"onnx", "torch", "matplotlib"}
print(*sorted(unwanted & {name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
