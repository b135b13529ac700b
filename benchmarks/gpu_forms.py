"""Every kernel form once, on small problems, each result validated: what a sanitizer is to look at.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu_forms
    python -m benchmarks.gpu_forms --device emulator

The problems are those of `gpu_problems` and `gpu_layer_problems`; a form that none of them launches is an
error. Each runs in memory of exactly the sizes that it takes, so that a byte beside it is a byte of nobody.
The answer is compared with one in extended precision, within the bound that the service promises. Tensor
cores are given sums besides that show how they round. Each problem is named before it runs; an error that a
device does not survive ends the program.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_arrays import NumpyArrays, convolved
from benchmarks.gpu_cases import ConvCase
from benchmarks.gpu_check import Wrong, sum_bound, within
from benchmarks.gpu_device import backend_of, lost
from benchmarks.gpu_layer_problems import check_layer, forms, layer_problems
from benchmarks.gpu_problems import Problem, ask, operator_of, problems
from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType, dtype_of
from convservice.layers import Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda import addition, elementwise, reducing, summing, windowed
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import Device, DeviceInfo, Memory, Stream
from convservice_backends.cuda.elementwise import LINEAR, copy_launch
from convservice_backends.cuda.source import Kernel
from convservice_backends.reference import rounded

RELU = "relu"

LAYERS = (windowed, reducing, summing, addition)
"""Modules of layers beside the convolution."""

LONG_SUM = ConvCase("sums of 4096 products", "forms", (1, 4096, 1, 72), (8, 4096, 1, 1))
"""As wide as it must be for the sums not to be split: a part's rounding errors would be fewer."""

SMALL_PRODUCTS = (-24, -23)
"""Powers of 2 that the products behind the first are just below: 1 + 2**-24 lies half way between two
float32."""


def check_problem(problem: Problem, mode: str, stream: Stream, info: DeviceInfo) -> float:
    """Runs a problem; the largest error as a share of the bound.

    Raises:
        Wrong: the bound is broken.
    """
    case = problem.case
    rng = np.random.default_rng(5)
    x, weight, bias = (
        rng.standard_normal(shape).astype(problem.given.numpy)
        for shape in (case.x, case.weight, case.weight[:1])
    )
    options: Any = {**case.geometry, "padding_mode": mode, "activation": RELU}
    algorithm, y = _computed(problem, x, Conv(weight, bias, **options), stream, info)
    exact, bound = _expected(problem, algorithm, mode, (x, weight, bias))
    return within(float((abs(y.astype(exact.dtype) - exact) / bound).max()))


def check_long_sum(given: DType, power: int, stream: Stream, info: DeviceInfo) -> float:
    """Has tensor cores add 4095 products just below 2**power to a first one of 1; the error's share.

    An adder that cuts off what lies below the last digit of its largest operand loses every one of them, and
    has then used up the bound of a sum in float32, (K + 3) u sum |x||w|: u is 2**-24. What it does is its
    maker's secret, so that each model is to be tried.

    Raises:
        Wrong: the bound is broken.
    """
    case = LONG_SUM
    problem = Problem(case, "tensor_core", given, FLOAT32, Precision.HIGH, 1)
    x = np.full(case.x, 2.0**-12 * (1 - given.roundoff))
    weight = np.full(case.weight, 2.0 ** (power + 12))
    x[:, 0] = weight[:, 0] = 1
    layer = Conv(weight.astype(given.numpy))
    _, y = _computed(problem, x.astype(given.numpy), layer, stream, info)
    exact = convolved(case, x, weight)  # float64 has all digits of these sums
    bound = (case.products + 3) * FLOAT32.roundoff * exact
    return within(float((abs(y.astype(np.float64) - exact) / bound).max()))


def _computed(
    problem: Problem, x: NDArray[Any], layer: Conv, stream: Stream, info: DeviceInfo
) -> tuple[str, NDArray[Any]]:
    """The algorithm that computed a problem, and the feature map."""
    arrays, operator = NumpyArrays(stream), operator_of(problem, layer, info)
    weights = tuple(arrays.held(array).memory for array in operator.weights())
    y = arrays.empty(problem.case.y, problem.out)
    ask(problem, operator, stream, info, (arrays.held(x).memory, y.memory, weights))
    return operator.name, arrays.read(y)


def _expected(
    problem: Problem, algorithm: str, mode: str, tensors: tuple[NDArray[Any], ...]
) -> tuple[Any, Any]:
    """The exact feature map, and how far a right one may be from it."""
    case = problem.case
    wide: Any = np.longdouble if problem.given == FLOAT64 else np.float64
    converted: Any = [array.astype(wide) for array in tensors]
    x, weight, bias = converted
    bias = bias.reshape(1, -1, *[1] * (x.ndim - 2))
    linear = convolved(case, x, weight, mode) + bias
    magnitude = convolved(case, abs(x), abs(weight), mode) + abs(bias)
    bound = sum_bound(case, problem.given, algorithm, (x, weight), (linear, magnitude))
    exact = np.maximum(linear, 0)
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

    def __init__(self, device: Device) -> None:
        import cupy

        self._device: Any = device
        self._stream = device.stream()
        self._cuda: Any = cupy.cuda

    def allocate(self, nbytes: int) -> Memory:
        """See `device.Stream`."""
        from convservice_backends.cupy.device import CupyMemory

        with self._device.guarded():
            return CupyMemory(self._cuda.MemoryPointer(self._cuda.memory.Memory(nbytes), 0), nbytes)

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
    begin, bad, done, gone = time.monotonic(), 0, 0, ""
    with closing(backend_of(options.device)) as backend:
        device = backend.contexts[0].device
        stream = cast("Stream", ExactStream(device)) if options.device == "cupy" else device.stream()
        for name, work in list(_work(device, stream))[index - 1 :: parts]:
            if options.only is not None and not options.only.search(name):
                continue
            done += 1
            print(name, flush=True)
            try:
                work()
            except Exception as exc:  # noqa: BLE001 - one problem's failure must not hide the others
                bad += 1
                print(f"  {type(exc).__name__}: {exc}", flush=True)
                gone = lost(device, exc)
            if gone:
                print(f"the device has failed for good: {gone}", flush=True)
                break
    print(f"{done} problems, {bad} of them wrong, {time.monotonic() - begin:.0f} s", flush=True)
    return 1 if bad or not done else 0


def _work(device: Device, stream: Stream) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is to be run, with its name: all forms with zeros around, then with the other paddings."""
    info = device.info
    found, missing = problems(info)
    missing |= {kernel for layers in LAYERS for kernel in layers.every_kernel()} - forms(info)
    for kernel in sorted(missing, key=lambda kernel: kernel.name):
        yield kernel.name, partial(_no_problem, kernel)
    for mode in ("zeros", "reflect", "replicate"):
        for problem in found:
            if mode == "zeros" or problem.case.padding:
                yield f"{problem}, {mode}", partial(check_problem, problem, mode, stream, info)
    for given in sorted({problem.given.name for problem in found if problem.algorithm == "tensor_core"}):
        if dtype_of(given).itemsize == 2:  # float32 is rounded to TF32, whose bound is wider
            for power in SMALL_PRODUCTS:
                name = f"tensor_core, 1 and 4095 products just below 2**{power}, {given}"
                yield name, partial(check_long_sum, dtype_of(given), power, stream, info)
    for layer_problem in layer_problems():
        yield str(layer_problem), partial(check_layer, layer_problem, stream, info)
    for kernel in dict.fromkeys(elementwise.every_kernel()):
        yield kernel.name, partial(check_elementwise, kernel, stream)


def _no_problem(kernel: Kernel) -> None:
    raise Wrong(f"no problem of the list launches {kernel.name}")


if __name__ == "__main__":
    sys.exit(main())
