"""The device that computes nothing is asked for the kernels that one is asked for that computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from convservice.bands import TensorSpec
from convservice.dtypes import FLOAT32, DType, dtype_of
from convservice.errors import InvalidRequest, ResourceExhausted
from convservice.geometry import SampleShape
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.network import Network
from convservice.nodes import Node
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms import NAMES
from convservice_backends.cuda.backend import CudaBackend
from convservice_backends.cuda.device import DeviceInfo
from convservice_backends.cuda.dry import kernels_for
from convservice_backends.cuda.source import Kernel
from convservice_backends.session import run
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from convservice_emulator.memory import Block


class WritingDevice(EmulatedDevice):
    """Computes, and writes down which kernels it ran."""

    def __init__(self) -> None:
        super().__init__(Compiler())
        self.ran: set[Kernel] = set()

    def run(self, kernel: Kernel, arguments: bytes, grid: tuple[int, int, int], blocks: list[Block]) -> None:
        self.ran.add(kernel)
        super().run(kernel, arguments, grid, blocks)


def spec_of(x: np.ndarray[Any, Any]) -> TensorSpec:
    return TensorSpec(dtype_of(x.dtype), SampleShape(x.shape[1], x.shape[2], x.shape[3:]), len(x), x.shape[2])


def conv(shape: tuple[int, ...], dtype: str = "float32", **options: Any) -> Conv:
    return Conv(np.ones(shape, dtype), **options)


def every_layer() -> Network:
    """All layers beside the convolution, for an input of (4, 9, 8)."""
    return Network(
        [
            Node("max", MaxPool(3, stride=1, padding=1)),
            Node("sum", Add("relu"), ("max", "input")),
            Node("average", AvgPool(2), ("sum",)),
            Node("up", ConvTranspose(np.ones((4, 10, 3, 3), np.float32), stride=2), ("average",)),
            Node("own", LocallyConnected(np.ones((2, 10, 8, 8, 2, 2), np.float32)), ("up",)),
            Node("flat", Flatten(), ("own",)),
            Node("scores", Linear(np.ones((5, 128), np.float32)), ("flat",)),
            Node("most", GlobalMaxPool(), ("up",)),
            Node("mean", GlobalAvgPool(), ("up",)),
        ],
        {name: name for name in ("flat", "scores", "most", "mean")},
    )


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(
    ("network", "x", "out_dtype"),
    [
        (Network([conv((4, 2, 3, 3), padding=1)]), np.zeros((3, 2, 9, 8), np.float32), None),
        (Network([conv((8, 16, 1, 1)), Activation("gelu")]), np.zeros((1, 16, 9, 8), np.float32), None),
        (Network([conv((2, 2, 5), "float16", stride=2)]), np.zeros((1, 2, 40), np.float16), FLOAT32),
        (Network([conv((6, 1, 3, 3), groups=6)]), np.zeros((2, 6, 12, 12), np.uint8), None),
        (Network([conv((2, 3, 2, 3, 3), "float64")]), np.zeros((1, 3, 4, 5, 6)), None),
        (Network([conv((1, 1, 3, 3))]), np.zeros((1, 1, 1100, 600), np.float32), None),
        (every_layer(), np.zeros((3, 4, 9, 8), np.float32), None),
    ],
    ids=["small samples", "chain", "1-D half", "depthwise", "3-D double", "bands", "every layer"],
)
def test_the_same_kernels(
    network: Network, x: np.ndarray[Any, Any], out_dtype: DType | None, precision: Precision
) -> None:
    device = WritingDevice()
    prepared = CudaBackend([device], {}).prepare(network, precision)
    for band_rows in (None, 400):
        run(prepared, x, band_rows=band_rows, out_dtype=out_dtype)
    found = kernels_for(network, spec_of(x), INFO, precision=precision, out_dtype=out_dtype)
    assert set(found) == device.ran
    assert len(found) == len(set(found)) > 0


@pytest.mark.parametrize("algorithm", NAMES)
def test_the_same_kernels_with_an_algorithm_of_ones_choice(algorithm: str) -> None:
    network = Network([conv((16, 16, 3, 3), padding=1)])  # all of them fit it
    x = np.zeros((1, 16, 9, 8), np.float32)
    device = WritingDevice()
    run(CudaBackend([device], {}, algorithm=algorithm).prepare(network, Precision.FAST), x)
    found = kernels_for(network, spec_of(x), INFO, precision=Precision.FAST, algorithm=algorithm)
    assert set(found) == device.ran
    assert any(kernel.name.startswith(algorithm) for kernel in found)


def test_an_algorithm_that_there_is_not() -> None:
    with pytest.raises(InvalidRequest, match="there is no algorithm 'magic'; known are "):
        kernels_for(
            Network([conv((1, 1, 3, 3))]),
            spec_of(np.zeros((1, 1, 9, 8), np.float32)),
            INFO,
            algorithm="magic",
        )


def test_a_tensor_that_the_device_is_too_small_for() -> None:
    small = DeviceInfo("small", 90, 1, 1 << 20)
    with pytest.raises(ResourceExhausted, match="bytes of device memory"):
        kernels_for(Network([conv((1, 1, 3, 3))]), spec_of(np.zeros((1, 1, 4000, 4000), np.float32)), small)
