"""Every kernel form once, on small problems, each result validated: what a sanitizer is to look at.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu_forms
    python -m benchmarks.gpu_forms --device emulator

`problems` finds, without a device, the smallest problems of a list that together launch every form that may
ever be compiled; a form that none of them launches is an error. Each runs in memory of exactly the sizes that
it takes, so that a byte beside it is a byte of nobody. The answer is compared with a convolution in extended
precision, within the bound that the service promises.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu import backend_of
from benchmarks.gpu_arrays import NumpyArrays, convolved
from benchmarks.gpu_cases import ConvCase
from benchmarks.gpu_check import Wrong, winograd_bound
from convservice.dtypes import DTYPES, FLOAT64, DType
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda import elementwise
from convservice_backends.cuda.algorithms import NAMES
from convservice_backends.cuda.algorithms.base import every_kernel
from convservice_backends.cuda.algorithms.tensor_core import tf32_roundoff
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.convolution import ConvOperator
from convservice_backends.cuda.device import Device, DeviceInfo, Memory, Stream
from convservice_backends.cuda.elementwise import LINEAR, copy_launch
from convservice_backends.cuda.source import Kernel
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Run
from convservice_backends.reference import rounded

FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_float)

PROCESSORS = (1, 2, 3, 4, 8, 16, 64, 1 << 20)
"""How many multiprocessors a device is said to have: tiles follow it."""

RELU = "relu"


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


@dataclass
class Recorder:
    """A stream that runs nothing, and knows what it was asked to launch."""

    kernels: set[Kernel] = field(default_factory=set[Kernel])

    def launch(self, launch: Any) -> None:
        """See `device.Stream`."""
        self.kernels.add(launch.kernel)

    def transform(self, transform: Any) -> None:
        """See `device.Stream`."""


@dataclass(frozen=True)
class Nowhere:
    """Memory that is not there."""

    nbytes: int
    address: int = 1 << 40


def problems(info: DeviceInfo) -> tuple[list[Problem], set[Kernel]]:
    """Problems that launch all forms that a device can run, and the forms that none of them launches."""
    wanted = {kernel for kernel in every_kernel() if kernel.minimum <= info.architecture}
    wanted -= set(elementwise.every_kernel())
    found: list[Problem] = []
    layers = {
        (case, dtype): Conv(np.ones(case.weight, dtype.numpy), **cast("Any", case.geometry))
        for case in CASES
        for dtype in FLOATS
    }
    for (case, given), layer in layers.items():
        for name, precision in itertools.product(NAMES, (Precision.HIGH, Precision.FAST)):
            first = Problem(case, name, given, given, precision, 1)
            if _operator(first, layer, info).name != name:
                continue
            for out in dict.fromkeys((given, given.accumulator)):
                for processors in PROCESSORS:
                    problem = replace(first, out=out, processors=processors)
                    new = _launched(problem, layer, info) & wanted
                    if new:
                        found.append(problem)
                        wanted -= new
    return found, wanted


def _launched(problem: Problem, layer: Conv, info: DeviceInfo) -> set[Kernel]:
    """The kernels of a problem, without a device."""
    recorder = Recorder()
    operator = _operator(problem, layer, info)
    nowhere = Nowhere(1 << 30)
    _ask(problem, operator, cast("Stream", recorder), info, (nowhere, nowhere, (nowhere, nowhere)))
    return recorder.kernels


def _operator(problem: Problem, layer: Conv, info: DeviceInfo) -> ConvOperator:
    case = problem.case
    given = SampleShape(case.x[1], case.x[2], case.x[3:])
    return ConvOperator(
        layer, problem.given, given, precision=problem.precision, info=info, algorithm=problem.algorithm
    )


def _ask(
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
    dry = isinstance(stream, Recorder)
    scratch = None if not wanted else x if dry else stream.allocate(wanted)
    workspace = DeviceWorkspace(stream, scratch, replace(info, processors=problem.processors), lambda: None)
    rows = DeviceArray.packed(x, case.x, problem.given)
    run = Run(rows, 0, given.rows, 0, whole.height, operator.block_plan(given, whole))
    operator.compute(run, DeviceArray.packed(y, case.y, problem.out), workspace, weights)


def check_problem(problem: Problem, mode: str, stream: Stream, info: DeviceInfo) -> float:
    """Runs a problem; the largest error as a share of the bound.

    Raises:
        Wrong: the bound is broken.
    """
    case, arrays = problem.case, NumpyArrays(stream)
    rng = np.random.default_rng(5)
    x, weight, bias = (
        rng.standard_normal(shape).astype(problem.given.numpy)
        for shape in (case.x, case.weight, case.weight[:1])
    )
    options: Any = {**case.geometry, "padding_mode": mode, "activation": RELU}
    operator = _operator(problem, Conv(weight, bias, **options), info)
    weights = tuple(arrays.held(array).memory for array in operator.weights())
    y = arrays.empty(case.y, problem.out)
    _ask(problem, operator, stream, info, (arrays.held(x).memory, y.memory, weights))
    exact, bound = _expected(problem, operator.name, mode, (x, weight, bias))
    share = float((abs(arrays.read(y).astype(exact.dtype) - exact) / bound).max())
    if not share <= 1:
        raise Wrong(f"{problem}, {mode}: an error is {share:.3g} times the bound")
    return share


def _expected(
    problem: Problem, algorithm: str, mode: str, tensors: tuple[NDArray[Any], ...]
) -> tuple[Any, Any]:
    """The exact feature map, and how far a right one may be from it."""
    case, sums = problem.case, problem.given.accumulator
    wide: Any = np.longdouble if problem.given == FLOAT64 else np.float64
    converted: Any = [array.astype(wide) for array in tensors]
    x, weight, bias = converted
    bias = bias.reshape(1, -1, *[1] * (x.ndim - 2))
    linear = convolved(case, x, weight, mode) + bias
    magnitude = convolved(case, abs(x), abs(weight), mode) + abs(bias)
    exact = np.maximum(linear, 0)
    if algorithm == "winograd":
        bound = winograd_bound(case, x, weight) * (1 + sums.roundoff) + sums.roundoff * abs(linear)
    elif algorithm == "tensor_core" and problem.given.name == "float32":
        bound = tf32_roundoff(case.products) * magnitude
    else:
        bound = (case.products + 3) * sums.roundoff * magnitude
    bound = bound + case.products * sums.smallest_normal
    return exact, bound + problem.out.roundoff * abs(exact) + problem.out.smallest_normal


def check_elementwise(kernel: Kernel, stream: Stream) -> None:
    """Runs a copy or a rounding, on rows with gaps between channels.

    Raises:
        Wrong: an element is not the exact one, rounded once.
    """
    constants = dict(kernel.constants)
    given, out = (DTYPES[constants[name] - 1] for name in ("IN", "OUT"))
    rng, arrays, shape = np.random.default_rng(6), NumpyArrays(stream), (2, 3, 5, 7)
    x = rng.integers(0, 100, (2, 3, 6, 7)).astype(given.numpy)
    if given.is_float:
        x = (rng.standard_normal(x.shape) * 300).astype(given.numpy)
    source = DeviceArray.packed(arrays.held(x).memory, x.shape, given)[:, :, 1:]
    held = arrays.held(np.zeros(shape, out.numpy))
    target = DeviceArray.packed(held.memory, shape, out)
    relu = (
        LINEAR if constants["COPY"] or given != out else Conv(np.ones((1, 1, 1)), activation=RELU).activation
    )
    launch = copy_launch(source, target, relu)
    if launch is None or launch.kernel != kernel:
        raise Wrong(f"{kernel.name} is not what copies {given} to {out}")
    stream.launch(launch)
    wide = x[:, :, 1:].astype(np.float64)
    exact = rounded(wide if relu is LINEAR else np.maximum(wide, 0), out)
    if not bool((arrays.read(held) == exact).all()):
        raise Wrong(f"{kernel.name}: an element is not the exact one, rounded once")


class ExactStream:
    """A stream of a GPU whose allocations are the driver's own, each of exactly the size asked for."""

    def __init__(self, stream: Stream) -> None:
        import cupy

        self._stream = stream
        self._cuda: Any = cupy.cuda

    def allocate(self, nbytes: int) -> Memory:
        """See `device.Stream`."""
        from convservice_backends.cupy.device import CupyMemory

        return CupyMemory(self._cuda.MemoryPointer(self._cuda.Memory(nbytes), 0), nbytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every form; the status is 1 where a result is wrong or a form was not launched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cupy", "emulator"), default="cupy")
    parser.add_argument("--only", type=re.compile, help="only problems whose name this expression finds")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th problem, beginning with the I-th")
    options = parser.parse_args(arguments)
    index, parts = (int(number) for number in options.part.split("/"))
    begin, bad, done = time.monotonic(), 0, 0
    with closing(backend_of(options.device)) as backend:
        device = backend.contexts[0].device
        stream = device.stream()
        if options.device == "cupy":
            stream = cast("Stream", ExactStream(stream))
        for name, work in list(_work(device, stream))[index - 1 :: parts]:
            if options.only is not None and not options.only.search(name):
                continue
            done += 1
            try:
                work()
            except Exception as exc:  # noqa: BLE001 - one problem's failure must not hide the others
                bad += 1
                print(f"{name}: {type(exc).__name__}: {exc}", flush=True)
    print(f"{done} problems, {bad} of them wrong, {time.monotonic() - begin:.0f} s", flush=True)
    return 1 if bad or not done else 0


def _work(device: Device, stream: Stream) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is to be run, with its name: all forms with zeros around, then with the other paddings."""
    found, missing = problems(device.info)
    for kernel in sorted(missing, key=lambda kernel: kernel.name):
        yield kernel.name, partial(_no_problem, kernel)
    for mode in ("zeros", "reflect", "replicate"):
        for problem in found:
            if mode == "zeros" or problem.case.padding:
                name = f"{problem}, {mode}"
                yield name, partial(check_problem, problem, mode, stream, device.info)
    for kernel in dict.fromkeys(elementwise.every_kernel()):
        yield kernel.name, partial(check_elementwise, kernel, stream)


def _no_problem(kernel: Kernel) -> None:
    raise Wrong(f"no problem of the list launches {kernel.name}")


if __name__ == "__main__":
    sys.exit(main())
