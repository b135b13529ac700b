"""Small problems that together launch every form of every kernel, found without a device.

`problems` is given what a device is and hands on the smallest problems of a list that launch, in all, every
form that such a device can run, and the forms that none of them launches. `operator_of` and `ask` are how a
problem is computed, on a device or on one that only writes down what it is asked to launch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from benchmarks.gpu_cases import ConvCase
from convservice.dtypes import DTYPES, DType
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda import addition, elementwise, reducing, summing, windowed
from convservice_backends.cuda.algorithms import NAMES
from convservice_backends.cuda.algorithms.base import every_kernel
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.convolution import ConvOperator
from convservice_backends.cuda.device import DeviceInfo, Memory, Stream
from convservice_backends.cuda.dry import DryDevice
from convservice_backends.cuda.source import Kernel
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Rows, Run

FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_float)

PROCESSORS = (1, 2, 3, 4, 8, 16, 64, 1 << 20)
"""How many multiprocessors a device is said to have: tiles follow it."""


def _case(x: tuple[int, ...], weight: tuple[int, ...], **geometry: int) -> ConvCase:
    return ConvCase(f"{x} by {weight}", "forms", x, weight, **geometry)


CASES = (
    _case((2, 3, 7, 9), (5, 3, 3, 3), padding=1),
    _case((2, 3, 30), (4, 3, 5), padding=2),
    _case((1, 3, 4, 5, 6), (4, 3, 3, 2, 3), padding=1),
    _case((2, 6, 7, 9), (6, 1, 3, 3), padding=1, groups=6),
    _case((2, 6, 9, 16), (6, 1, 3, 3), padding=1, stride=2, groups=6),
    _case((2, 8, 7, 16), (8, 4, 3, 3), padding=1, groups=2),
    _case((2, 8, 9, 16), (8, 4, 3, 3), padding=1, stride=2, groups=2),
    _case((1, 3, 9, 16), (3, 1, 5, 5), padding=2, groups=3),
    _case((1, 3, 11, 16), (3, 1, 5, 5), padding=2, stride=2, groups=3),
    _case((1, 3, 9, 16), (3, 1, 7, 7), padding=3, groups=3),
    _case((1, 4, 9, 10), (4, 1, 2, 4), dilation=2, groups=4),
    _case((2, 16, 9, 11), (16, 16, 3, 3), padding=1),
    _case((2, 16, 8, 8), (24, 16, 1, 1)),
    _case((2, 16, 8, 8), (40, 16, 1, 1)),
    _case((2, 16, 16, 16), (72, 16, 1, 1)),
    _case((2, 3, 12, 13), (72, 3, 3, 3), padding=1),
    _case((2, 16, 12, 13), (72, 16, 3, 3), padding=1),
    _case((2, 16, 12, 13), (130, 16, 3, 3), padding=1),
    _case((2, 16, 16, 16), (130, 16, 1, 1)),
    _case((2, 72, 6, 7), (40, 72, 3, 3), padding=1),
    _case((1, 72, 3, 11), (24, 72, 5, 5), padding=2),
    _case((2, 520, 4, 4), (72, 520, 1, 1)),
    _case((1, 1024, 4, 4), (40, 1024, 1, 1)),
    _case((1, 1024, 8, 16), (136, 1024, 1, 1)),
    _case((1, 160, 4, 4), (136, 160, 3, 3), padding=1),
    _case((4, 160, 8, 8), (136, 160, 3, 3), padding=1),
    _case((1, 2, 24, 25), (2, 2, 19, 19), padding=9),
    _case((1, 1, 24, 40), (33, 1, 25, 25), padding=12),
)
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Problem:
    """One convolution by one algorithm.

    Attributes:
        case: its sizes.
        algorithm: by name.
        given: dtype of rows and filters.
        out: dtype of the feature map.
        precision: what the caller allows.
        processors: multiprocessors that the device is said to have.
    """

    case: ConvCase
    algorithm: str
    given: DType
    out: DType
    precision: Precision
    processors: int

    def __str__(self) -> str:
        types = self.given.name if self.given == self.out else f"{self.given} to {self.out}"
        return f"{self.algorithm}, {self.case.name}, {types}, {self.processors} processors"


def problems(info: DeviceInfo) -> tuple[list[Problem], set[Kernel]]:
    """Problems that launch all forms that a device can run, and the forms that none of them launches."""
    wanted = {kernel for kernel in every_kernel() if kernel.minimum <= info.architecture}
    for others in (elementwise, windowed, reducing, summing, addition):  # of other layers
        wanted -= set(others.every_kernel())
    found: list[Problem] = []
    layers = {
        (case, dtype): Conv(np.ones(case.weight, dtype.numpy), **cast("Any", case.geometry))
        for case in CASES
        for dtype in FLOATS
    }
    for (case, given), layer in layers.items():
        for name, precision in itertools.product(NAMES, (Precision.HIGH, Precision.FAST)):
            first = Problem(case, name, given, given, precision, 1)
            if operator_of(first, layer, info).name != name:
                continue
            for out in dict.fromkeys((given, given.accumulator)):
                for processors in PROCESSORS:
                    problem = replace(first, out=out, processors=processors)
                    new = launched(problem, layer, info) & wanted
                    if new:
                        found.append(problem)
                        wanted -= new
    return found, wanted


def launched(problem: Problem, layer: Conv, info: DeviceInfo) -> set[Kernel]:
    """The kernels of a problem, without a device."""
    device = DryDevice(info)
    memory = device.allocate(1 << 30)
    ask(problem, operator_of(problem, layer, info), device.stream(), info, (memory, memory, (memory, memory)))
    return set(device.launched)


def operator_of(problem: Problem, layer: Conv, info: DeviceInfo) -> ConvOperator:
    """What computes a problem; another algorithm where the problem's own does not fit."""
    case = problem.case
    given = SampleShape(case.x[1], case.x[2], case.x[3:])
    return ConvOperator(
        layer, problem.given, given, precision=problem.precision, info=info, algorithm=problem.algorithm
    )


def ask(
    problem: Problem,
    operator: ConvOperator,
    stream: Stream,
    info: DeviceInfo,
    memories: tuple[Memory, Memory, tuple[Memory, ...]],
) -> None:
    """Asks for a problem in the memories of input, feature map and weights."""
    case, (x, y, weights) = problem.case, memories
    given = SampleShape(case.x[1], case.x[2], case.x[3:])
    whole = SampleShape(case.y[1], case.y[2], case.y[3:])
    wanted = operator.scratch_bytes(whole, whole.height, case.batch)
    scratch = stream.allocate(wanted) if wanted else None
    workspace = DeviceWorkspace(stream, scratch, replace(info, processors=problem.processors), lambda: None)
    rows = DeviceArray.packed(x, case.x, problem.given)
    run = Run((Rows(rows, 0),), given.rows, 0, whole.height, operator.block_plan(given, whole))
    operator.compute(run, DeviceArray.packed(y, case.y, problem.out), workspace, weights)
