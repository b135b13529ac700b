"""Small layers that make every kernel go through all that it does, recorded on the emulator.

Each is small enough for a sanitizer, with edges in every tile: fewer filters and positions than a tile has,
terms that fill more than one stage of a pipeline, padding. Those of convolutions are here, those of other
layers are some of `benchmarks.gpu_layer_problems`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.gpu_layer_problems import RECIPES, LayerProblem
from convservice.dtypes import FLOAT32, dtype_of
from convservice.layers import Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.elementwise import copy_launch
from convservice_emulator.build import Compiler
from convservice_emulator.recording import Recorded, RecordingDevice, record_layer
from tests.helpers import random_array


@dataclass(frozen=True)
class Sample:
    """A layer for one algorithm.

    Attributes:
        algorithm: its name.
        shape: (N, channels, *spatial) of the input.
        weight: shape of the filter bank.
        dtype: name of the dtype of both.
        options: further arguments of the layer.
        precision: what the caller allows.
        activation: of the layer.
    """

    algorithm: str
    shape: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=lambda: {"padding": 1}, hash=False)
    precision: Precision = Precision.HIGH
    activation: str = "relu"

    def __str__(self) -> str:
        rank = len(self.shape) - 2
        kernel = "x".join(map(str, self.weight[2:]))
        return f"{self.algorithm}-{self.dtype}-{rank}-D-{self.weight[1]}-channels-{kernel}"


FAST = Precision.FAST
GROUPED: dict[str, Any] = {"padding": 1, "groups": 6, "stride": 2}

SAMPLES = (
    Sample("direct", (2, 3, 7, 9), (5, 3, 3, 3)),
    Sample("implicit_gemm", (2, 16, 7, 9), (5, 16, 3, 3)),
    Sample("implicit_gemm", (2, 3, 7, 9), (37, 3, 3, 3)),
    Sample("implicit_gemm", (1, 32, 8, 8), (5, 32, 1, 1), options={}),
    Sample("implicit_gemm", (2, 5, 30), (3, 5, 4), "float64"),
    Sample("implicit_gemm", (1, 160, 4, 4), (8, 160, 3, 3)),
    Sample("depthwise", (2, 6, 7, 9), (6, 1, 3, 3), options={"padding": 1, "groups": 6}),
    Sample("depthwise", (2, 6, 9, 9), (12, 1, 5, 5), "float16", GROUPED),
    Sample("depthwise", (1, 6, 4, 5, 6), (6, 1, 2, 3, 2), options={"groups": 6}),
    Sample("tensor_core", (2, 16, 7, 9), (5, 16, 3, 3), "float16"),
    Sample("tensor_core", (2, 3, 9, 11), (40, 3, 3, 3), "bfloat16"),
    Sample("tensor_core", (1, 40, 6, 40), (70, 40, 3, 3), "bfloat16", activation="silu"),
    Sample("tensor_core", (2, 12, 7, 9), (5, 12, 3, 3), precision=FAST),
    Sample("fourier", (2, 3, 9, 11), (5, 3, 5, 5), options={"padding": 2}),
    Sample("winograd", (2, 24, 9, 11), (37, 24, 3, 3), precision=FAST),
)

OTHERS = tuple(
    LayerProblem(recipe, dtype_of(dtype), dtype_of(dtype))
    for recipe in RECIPES
    if (
        dtype := {
            "max dilated, rounded up": "float32",
            "average rounded up, padding counted": "bfloat16",
            "transposed 4x4 stride 2": "float32",
            "transposed, dilated by more than it steps": "float32",
            "transposed depthwise": "float64",
            "local 3x3": "float16",
            "local with thresholds at every position": "float32",
            "global max": "float32",
            "global average": "float32",
            "linear, one sample": "float32",
            "linear, eleven samples": "float16",
            "sum of twenty": "float32",
        }.get(recipe.name)
    )
)
"""Layers beside the convolution."""

EVERY: tuple[Sample | LayerProblem, ...] = (*SAMPLES, *OTHERS)


@lru_cache(maxsize=len(EVERY))
def recorded(compiler: Compiler, sample: Sample | LayerProblem) -> tuple[Recorded, ...]:
    """The launches of a sample."""
    if isinstance(sample, LayerProblem):
        other, inputs = sample.made()
        return record_layer(compiler, other, *inputs, out_dtype=sample.out)
    rng = np.random.default_rng(11)
    dtype = dtype_of(sample.dtype)
    x = random_array(rng, sample.shape, dtype)
    weight = random_array(rng, sample.weight, dtype)
    thresholds = random_array(rng, sample.weight[:1], dtype)
    layer = Conv(weight, thresholds, activation=sample.activation, **sample.options)
    return record_layer(compiler, layer, x, algorithm=sample.algorithm, precision=sample.precision)


@lru_cache(maxsize=2)
def recorded_copy(compiler: Compiler, rounded: bool) -> Recorded:
    """The launch that copies an array, rounding it to bytes if so wanted."""
    device = RecordingDevice(compiler)
    stream = device.stream()
    x = np.random.default_rng(12).normal(size=(2, 3, 5, 7)).astype(np.float32) * 100
    source = DeviceArray.packed(stream.allocate(x.nbytes), x.shape, FLOAT32)
    stream.upload(x.reshape(-1).view(np.uint8), source.memory)
    dtype = dtype_of("uint8") if rounded else FLOAT32
    target = DeviceArray.packed(stream.allocate(x.size * dtype.itemsize), x.shape, dtype)
    launch = copy_launch(source, target)
    assert launch is not None
    stream.launch(launch)
    stream.synchronize()
    return device.recorded[-1]
