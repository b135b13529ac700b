"""Convolutions on a GPU, each algorithm beside cuDNN on the same tensors.

    make bench-gpu
    PYTHONPATH=client:backends:server python3 -m benchmarks.gpu    (a checkout that was not installed)
    python -m benchmarks.gpu --families ResNet-50 --precisions float32 --algorithms chosen --minutes 5
    python -m benchmarks.gpu --plot benchmarks/results/gpu-h100.json

Every result is validated first; what is wrong is reported so and not timed. A case that fails is noted and
the next one follows. JSON and table are written after every case; the plot is drawn from the JSON, on any
machine. `--device emulator --families tiny` tries the program where there is no GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_arrays import NumpyArrays, TorchArrays
from benchmarks.gpu_cases import FAMILIES, TINY, ConvCase, Family
from benchmarks.gpu_check import Wrong
from benchmarks.gpu_clocks import EventClock, HostClock, Times
from benchmarks.gpu_layers import PRECISIONS, Rig, Tensors, fitting, measure, peer_times, tensors_of
from benchmarks.gpu_plot import draw
from benchmarks.gpu_stream import Stretch, stream_images
from benchmarks.gpu_table import OK, Report, Row, geometric_mean, ratios
from convservice_backends.cuda.algorithms import base
from convservice_backends.cuda.backend import CudaBackend

RESULTS = Path(__file__).parent / "results"

TINY_STRETCH = {"images": 3, "shape": (3, 12, 16), "filters": 4, "repeats": 1}


def kernels_digest() -> str:
    """SHA-256 over the digests of all kernels' sources, in hexadecimal: what was measured."""
    whole = hashlib.sha256()
    for digest in sorted({kernel.digest for kernel in base.every_kernel()}):
        whole.update(bytes.fromhex(digest))
    return whole.hexdigest()


def model_of(name: str) -> str:
    """A device's model as a file's name: "NVIDIA H100 80GB HBM3" is "h100-80gb-hbm3"."""
    bare = re.sub(r"\b(nvidia|geforce|tesla)\b", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", bare).strip("-") or "device"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; the status is 1 where a result was wrong or a case failed."""
    options = _parser().parse_args(arguments)
    if options.plot is not None:
        path = options.plot.with_suffix(".png")
        draw(Report.read(options.plot), path)
        print(path)
        return 0
    with ExitStack() as stack:
        backend = stack.enter_context(closing(backend_of(options.device)))
        emulated = options.device == "emulator"
        rig = _emulated(backend) if emulated else _gpu(stack, backend, options.seconds)
        report = Report(_header(backend, options))
        model = model_of(rig.device.info.name)
        path = options.output or RESULTS / f"gpu-{model}"
        _measure_all(rig, report, options, path)
        if not options.no_stream:
            _stream_all(backend, report, options)
        report.write(path)
    for precision in PRECISIONS:
        mean = geometric_mean(ratios(report, None, precision))
        if mean is not None:
            print(f"ratio to cuDNN, {precision}, geometric mean: {mean:.2f}")
    if any(row.ratio is not None for row in report.rows):
        draw(report, path.with_suffix(".png"))
    print(path.with_suffix(".md"))
    bad = [row for row in report.rows if row.status != OK]
    bad_stream = [figures for figures in report.stream if "status" in figures]
    return 1 if bad or bad_stream else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [family.name for family in (*FAMILIES, TINY)]
    parser.add_argument("--device", choices=("cupy", "emulator"), default="cupy")
    parser.add_argument("--families", nargs="+", choices=known, help="all of the real ones where not given")
    parser.add_argument("--batches", nargs="+", type=int, help="only those of a family's")
    parser.add_argument("--cases", type=re.compile, help="only cases whose name this expression finds")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS))
    parser.add_argument(
        "--algorithms", default="all", help="all (default), chosen, or names with commas between them"
    )
    parser.add_argument("--seconds", type=float, default=0.005, help="of work in one measurement")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further case begins")
    parser.add_argument("--only-validate", action="store_true", help="time nothing")
    parser.add_argument("--no-peer", action="store_true", help="without cuDNN")
    parser.add_argument("--no-channels-last", action="store_true", help="without cuDNN's other layout")
    parser.add_argument("--no-stream", action="store_true", help="without the stream of images")
    parser.add_argument("--images", type=int, default=64, help="of the stream")
    parser.add_argument("--output", type=Path, help="path without suffix; benchmarks/results/gpu-MODEL else")
    parser.add_argument(
        "--plot", type=Path, metavar="JSON", help="draw the plot of a kept result, and no more"
    )
    return parser


def backend_of(device: str) -> CudaBackend:
    """The backend on GPUs, or on the device that stands in for one."""
    if device == "emulator":
        found: CudaBackend = importlib.import_module("convservice_emulator.backend").EmulatorBackend()
        return found
    from convservice_backends.cupy.backend import CupyBackend

    return CupyBackend()


def _emulated(backend: CudaBackend) -> Rig:
    device = backend.contexts[0].device
    stream = device.stream()
    return Rig(device, stream, NumpyArrays(stream), HostClock(stream))


def _gpu(stack: ExitStack, backend: CudaBackend, seconds: float) -> Rig:
    """PyTorch and the backend on the same device, in streams of their own."""
    arrays = TorchArrays()
    torch = arrays.torch
    device = backend.contexts[0].device
    stream: Any = device.stream()
    outer = torch.cuda.ExternalStream(stream.stream.ptr)
    clock = EventClock(torch, outer, seconds)
    peer = EventClock(torch, torch.cuda.current_stream(), seconds)
    stack.callback(torch.cuda.synchronize)
    return Rig(device, stream, arrays, clock, peer)


def _header(backend: CudaBackend, options: argparse.Namespace) -> dict[str, str]:
    described = backend.describe()
    versions = dict(described.versions)
    if options.device == "cupy":
        torch = importlib.import_module("torch")
        versions |= {"torch": str(torch.__version__), "torch's CUDA": str(torch.version.cuda)}
        versions["cuDNN"] = str(torch.backends.cudnn.version())
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    return {
        "device": described.device,
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "kernels": kernels_digest(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "options": " ".join(
            f"{name}={value}" for name, value in sorted(vars(options).items()) if name != "output" and value
        ),
    }


def _chosen_cases(options: argparse.Namespace) -> Iterator[ConvCase]:
    families: tuple[Family, ...] = FAMILIES
    if options.families:
        families = tuple(family for family in (*FAMILIES, TINY) if family.name in options.families)
    for family in families:
        for batch in family.batches:
            if options.batches and batch not in options.batches:
                continue
            for case in family.cases:
                if options.cases is None or options.cases.search(case.name):
                    yield case.at_batch(batch)


def _measure_all(rig: Rig, report: Report, options: argparse.Namespace, path: Path) -> None:
    """Measures every case in every precision, until the time is up."""
    until = time.monotonic() + 60 * options.minutes
    left = 0
    for case in _chosen_cases(options):
        for precision in options.precisions:
            if time.monotonic() > until:
                left += 1
                continue
            begin = time.monotonic()
            rows = list(_measure_case(rig, case, precision, options))
            report.rows += rows
            for row in rows:
                print(_line(row), flush=True)
            rig.arrays.tidy()
            if time.monotonic() - begin > 10:
                print(f"  ({time.monotonic() - begin:.0f} s)", flush=True)
        report.write(path)
    if left:
        report.notes.append(f"{left} cases, for which the {options.minutes:g} minutes did not suffice")


def _line(row: Row) -> str:
    numbers = [
        f"{name} {value:.4g}"
        for name, value in (
            ("error", row.error),
            ("us", row.device_us),
            ("TFLOP/s", row.teraflops),
            ("GB/s", row.gigabytes),
            ("ratio", row.ratio),
            ("host us", row.host_us),
        )
        if value is not None
    ]
    name = f"*{row.algorithm}" if row.chosen else row.algorithm
    said = f"{row.status} ({', '.join(numbers)})" if numbers else row.status
    return f"{row.family}, {row.case}, batch {row.batch}, {row.precision}: {name}: {said}"


def _measure_case(rig: Rig, case: ConvCase, precision: str, options: argparse.Namespace) -> Iterator[Row]:
    """One row for each algorithm; whatever goes wrong becomes a row too."""
    blank: dict[str, Any] = {
        "family": case.family,
        "case": case.name,
        "batch": case.batch,
        "precision": precision,
        "operations": case.operations,
    }
    try:
        tensors = tensors_of(rig, case, precision)
        blank["nbytes"] = case.moved(tensors.dtype.itemsize)
        names = fitting(case, tensors.layer, tensors.dtype, PRECISIONS[precision][1], rig.device.info)
    except Exception as exc:  # noqa: BLE001 - one case's failure must not take the others along
        yield _failed(blank | {"nbytes": 0}, "none", exc, chosen=True)
        return
    peers: dict[str, float | None] = {}
    if not options.only_validate and not options.no_peer and rig.peer_clock is not None:
        peers = _peers(rig, case, precision, tensors, options)
    for name in names:
        chosen = name == names[0]
        if options.algorithms not in {"all", "chosen"} and name not in options.algorithms.split(","):
            continue
        if options.algorithms == "chosen" and not chosen:
            continue
        try:
            found = measure(rig, case, precision, name, tensors, timed=not options.only_validate)
        except Exception as exc:  # noqa: BLE001 - as above
            yield _failed(blank, name, exc, chosen=chosen)
            continue
        times = found.times
        timed = {} if times is None else _microseconds(times)
        measured: dict[str, Any] = {"error": found.error, "launches": found.launches, **timed, **peers}
        yield Row(**blank, algorithm=name, chosen=chosen, status=OK, **measured)


def _microseconds(times: Times) -> dict[str, float]:
    return {
        "device_us": times.device * 1e6,
        "host_us": times.host * 1e6,
        "unaided_us": times.unaided * 1e6,
    }


def _peers(
    rig: Rig, case: ConvCase, precision: str, tensors: Tensors, options: argparse.Namespace
) -> dict[str, float | None]:
    """cuDNN's times in both layouts; None where it fails."""
    layouts = {"peer_us": "contiguous"}
    if not options.no_channels_last:
        layouts["peer_channels_last_us"] = "channels_last"
    found: dict[str, float | None] = {}
    for name, layout in layouts.items():
        try:
            times = peer_times(rig, case, precision, tensors, layout)
            found[name] = None if times is None else times.device * 1e6
        except Exception as exc:  # noqa: BLE001 - as above
            print(f"cuDNN, {layout}: {case.name}: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
            found[name] = None
    return found


def _failed(blank: dict[str, Any], algorithm: str, exc: Exception, *, chosen: bool) -> Row:
    kind = "wrong" if isinstance(exc, Wrong) else f"failed: {type(exc).__name__}"
    said = " ".join(str(exc).split()).replace("|", "/")[:200]
    return Row(**blank, algorithm=algorithm, chosen=chosen, status=f"{kind}: {said}")


def _stream_all(backend: CudaBackend, report: Report, options: argparse.Namespace) -> None:
    """The stream of images, as float32 and as uint8."""
    for dtype in ("float32", "uint8"):
        small: Any = TINY_STRETCH if options.device == "emulator" else {"images": options.images}
        try:
            figures = stream_images(backend, Stretch(dtype=dtype, **small))
        except Exception as exc:  # noqa: BLE001 - as above
            figures = {"images": dtype, "status": f"failed: {type(exc).__name__}: {exc}"}
        report.stream.append(figures)
        for name, value in figures.items():
            print(f"stream, {name}: {value}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
