"""Convolutional layers computed elsewhere: one call, a NumPy array back.

    import convservice
    import numpy as np

    rows = "33210 00131 31223 20022 20001".split()
    x = np.array([[int(value) for value in row] for row in rows], "float32")
    weight = np.array([[0, 1, 2], [2, 2, 0], [0, 1, 2]], "float32")

    with convservice.connect("localhost:50051") as client:
        print(client.conv2d(x, weight))  # [[12. 12. 17.] [10. 17. 19.] [ 9.  6. 14.]]

        edges = convservice.Network([convservice.Conv(weight[None, None], padding="same", activation="relu")])
        for feature_map in client.map(edges, [x[None]] * 3):  # (C, H, W) each
            print(feature_map.shape)  # (1, 5, 5)

What follows from shapes alone (`Network.output_shape`, `Conv.receptive_field`, `Network.plan`) needs no
server. `connect_async` gives the same client for asyncio. Every error is a `ConvServiceError`.
"""

from convservice.aio import AsyncConvClient, connect_async
from convservice.bands import Band
from convservice.client import ConvClient, connect
from convservice.errors import (
    BackendUnavailable,
    Cancelled,
    ConvServiceError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MissingPackage,
    NetworkNotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
    Unauthenticated,
)
from convservice.fields import NetworkField
from convservice.files import load, save
from convservice.geometry import SampleShape
from convservice.imports.onnx_graph import load_onnx
from convservice.imports.torch_modules import from_torch
from convservice.info import BackendInfo, Limits, ServerInfo, Usage
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
    ReceptiveField,
)
from convservice.network import LayerPlan, Network
from convservice.nodes import Node, Residual
from convservice.progress import Progress
from convservice.registered import AsyncRegisteredNetwork, RegisteredNetwork
from convservice.summary import Summary
from convservice.version import __version__
from convservice.wire.headers import TensorReport

__all__ = [
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
