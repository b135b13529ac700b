"""Layers beside the convolution on a GPU, each beside PyTorch on the same tensors.

    python -m benchmarks.gpu_others
    python -m benchmarks.gpu_others --cases transposed --batches 32 --precisions float16
    python -m benchmarks.gpu_others --device emulator --cases tiny

`make bench-gpu-others` runs it. Every result is validated first, against the same layer in
float64 (on the device, by PyTorch) within the promised bound; what is wrong is reported so and not timed. How
times are taken is said in `gpu_clocks`. The Markdown table is written after every line of it. `--device
emulator` tries the program where there is no GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu import emulated_rig, gpu_rig, model_of
from benchmarks.gpu_arrays import TorchArrays
from benchmarks.gpu_check import Wrong, within
from benchmarks.gpu_clocks import Times, copies_for
from benchmarks.gpu_device import backend_of
from benchmarks.gpu_exact import Exact, exact
from benchmarks.gpu_layers import Rig
from benchmarks.gpu_other_cases import CASES, TINY, OtherCase, peer
from benchmarks.gpu_report import write_whole
from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import GlobalMaxPool, Layer, Linear, MaxPool
from convservice.wire.enums import Precision
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.operators import compute_whole, operator_for

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("float32", "float16", "bfloat16")
BATCHES = (1, 32)

Array = NDArray[Any]


@dataclass(frozen=True)
class OtherRow:
    """One line of the table; times are None where it was not timed."""

    case: str
    batch: int
    precision: str
    status: str
    error: float = math.nan
    gigabytes: float = math.nan
    times: Times | None = None
    peer: Times | None = None


class OtherOnDevice:
    """A layer with its tensors on a device, on as many copies as a cache does not hold."""

    def __init__(self, rig: Rig, case: OtherCase, batch: int, dtype: DType) -> None:
        arrays, info = rig.arrays, rig.device.info
        numbers = np.random.default_rng(3)

        def random(*shape: int) -> Array:
            return (numbers.standard_normal(shape, np.float32) / 8).astype(dtype.numpy)

        self.layer = case.make(random)
        self.inputs = [random(batch, *case.sample) for _ in range(case.inputs)]
        sample = SampleShape(case.sample[0], case.sample[1], case.sample[2:])
        flat = SampleShape.of_vector(sample.elements) if isinstance(self.layer, Linear) else sample
        whole = self.layer.output_sample(flat)
        self._operator = operator_for(
            self.layer, [dtype] * case.inputs, sample, precision=Precision.HIGH, info=info
        )
        self._rig = rig
        shape = (batch, whole.channels, whole.height, *whole.rest)
        self._held = [arrays.held(x) for x in self.inputs]
        self._weights = [arrays.held(array) for array in self._operator.weights()]
        moved = [held.memory.nbytes for held in (*self._held, *self._weights)]
        self.nbytes = sum(moved) + math.prod(shape) * dtype.itemsize
        self.copies = copies_for(self.nbytes, rig.clock.cache_bytes)
        self._sets = [
            (
                [arrays.held(x) for x in self.inputs],
                [arrays.held(array) for array in self._operator.weights()],
                arrays.empty(shape, dtype),
            )
            for _ in range(self.copies)
        ]
        self._shape, self._dtype = shape, dtype
        arrays.synchronize()

    def ask(self, piece: int) -> None:
        """Asks for one feature map."""
        inputs, weights, y = self._sets[piece % self.copies]
        rows = [
            DeviceArray.packed(held.memory, x.shape, self._dtype)
            for held, x in zip(inputs, self.inputs, strict=True)
        ]
        out = DeviceArray.packed(y.memory, self._shape, self._dtype)
        memories = tuple(held.memory for held in weights)
        info = self._rig.device.info
        compute_whole(self._operator, rows, out, self._rig.stream, info=info, weights=memories)

    def read(self) -> Array:
        """What the first copy's feature map is."""
        arrays = self._rig.arrays
        return arrays.host(arrays.read(self._sets[0][2])).reshape(self._shape)


def expected(rig: Rig, layer: Layer, inputs: Sequence[Array]) -> Exact:
    """What a layer should give: by PyTorch in float64 on the device, where there is none by plain loops."""
    if not isinstance(rig.arrays, TorchArrays):
        return exact(layer, inputs)
    arrays, torch = rig.arrays, rig.arrays.torch
    tensors = [arrays.double(arrays.held(array).array) for array in (*inputs, *_arrays_of(layer))]
    value = peer(layer, torch, *tensors)
    magnitude = peer(layer, torch, *(abs(tensor) for tensor in tensors))
    terms = math.prod(layer.tensors[0].shape[1:]) if layer.tensors else math.prod(inputs[0].shape[2:])
    exactly = isinstance(layer, MaxPool | GlobalMaxPool)
    return Exact(arrays.host(value), arrays.host(magnitude), 0 if exactly else terms)


def _arrays_of(layer: Layer) -> list[Array]:
    return [tensor.array for tensor in layer.tensors]


def measure(rig: Rig, case: OtherCase, batch: int, precision: str) -> OtherRow:
    """Validates a case and times it, and its peer.

    Raises:
        Wrong: it is not what is promised.
    """
    dtype = dtype_of(precision)
    ours = OtherOnDevice(rig, case, batch, dtype)
    ours.ask(0)
    found, wanted = ours.read(), expected(rig, ours.layer, ours.inputs)
    value = wanted.value.reshape(found.shape)
    bound = np.broadcast_to(wanted.bound(dtype.accumulator, dtype).reshape(found.shape), found.shape)
    error = within(float((np.abs(found.astype(value.dtype) - value) / bound).max()))
    times = rig.clock.times(ours.ask, ours.copies)
    rate = ours.nbytes / times.device / 1e9
    return OtherRow(case.name, batch, precision, "ok", error, rate, times, _peer(rig, ours))


def _peer(rig: Rig, ours: OtherOnDevice) -> Times | None:
    """PyTorch's times on as many copies of the same tensors; TF32 off."""
    if rig.peer_clock is None or not isinstance(rig.arrays, TorchArrays):
        return None
    arrays, torch = rig.arrays, rig.arrays.torch
    sets = [
        [arrays.held(array).array for array in (*ours.inputs, *_arrays_of(ours.layer))]
        for _ in range(ours.copies)
    ]

    def ask(piece: int) -> None:
        peer(ours.layer, torch, *sets[piece % len(sets)])

    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        return rig.peer_clock.times(ask, ours.copies)


def markdown(rows: Sequence[OtherRow], device: str) -> list[str]:
    """The table."""
    lines = [
        "# Layers beside the convolution on a GPU, beside PyTorch",
        "",
        f"`make bench-gpu-others`, on {device}. GB/s count inputs, weights and feature map once.",
        "Ratio: PyTorch's time over this one's.",
        "",
        "| layer | batch | precision | error | us | GB/s | PyTorch us | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row.case, row.batch, row.precision]
        if row.times is None:
            cells += [row.status, "", "", "", ""]
        else:
            ours, peer = row.times.device, None if row.peer is None else row.peer.device
            cells += [f"{row.error:.2f}", f"{ours * 1e6:.1f}", f"{row.gigabytes:.0f}"]
            cells += ["", ""] if peer is None else [f"{peer * 1e6:.1f}", f"{peer / ours:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; the status is 1 where a result was wrong or a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cupy", "emulator"), default="cupy")
    parser.add_argument("--cases", type=re.compile, help="only cases whose name this expression finds")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--seconds", type=float, default=0.005, help="of work in one measurement")
    parser.add_argument("--output", type=Path, help="path without suffix; else results/gpu-others-MODEL")
    options = parser.parse_args(arguments)
    rows: list[OtherRow] = []
    with ExitStack() as stack:
        backend = stack.enter_context(closing(backend_of(options.device)))
        name = backend.describe().device
        path = (options.output or RESULTS / f"gpu-others-{model_of(name)}").with_suffix(".md")
        emulated = options.device == "emulator"
        rig = emulated_rig(backend) if emulated else gpu_rig(stack, backend, options.seconds)
        for case, batch, precision in _wanted(options):
            try:
                row = measure(rig, case, batch, precision)
            except Exception as exc:  # noqa: BLE001 - one case's failure must not hide the others
                kind = "wrong" if isinstance(exc, Wrong) else type(exc).__name__
                row = OtherRow(case.name, batch, precision, f"{kind}: {exc}")
            rows.append(row)
            lines = markdown(rows, name)
            print(lines[-1], flush=True)
            write_whole(path, "\n".join(lines) + "\n")
            if backend.failure:
                print(f"the device has failed for good: {backend.failure}", file=sys.stderr)
                break
    return 1 if not rows or any(row.status != "ok" for row in rows) else 0


def _wanted(options: argparse.Namespace) -> Iterator[tuple[OtherCase, int, str]]:
    for case in CASES:
        if options.cases.search(case.name) if options.cases else not case.name.startswith(TINY):
            for batch in options.batches:
                for precision in options.precisions:
                    yield case, batch, precision


if __name__ == "__main__":
    sys.exit(main())
