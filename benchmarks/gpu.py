"""Convolutions on a GPU, each algorithm beside cuDNN on the same tensors.

    make bench-gpu
    make bench-gpu BENCH_ARGS='--resume benchmarks/results/gpu-h100.json'
    PYTHONPATH=client:backends:server python3 -m benchmarks.gpu    (a checkout that was not installed)
    python -m benchmarks.gpu --families ResNet-50 --precisions float32 --algorithms chosen --minutes 5
    python -m benchmarks.gpu --plot benchmarks/results/gpu-h100.json

Every result is validated first; what is wrong is reported so and not timed. What fails is noted and the next
one follows. The JSON is written before and after every row, the table after every case; a run that was ended
by the time, a crash or a kernel that hangs is gone on with by --resume, which leaves out what was under way.
A file that is there is written by --resume alone. The plot is drawn from the JSON, on any machine. `--device
emulator --families tiny` tries the program where there is no GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_arrays import NumpyArrays, TorchArrays
from benchmarks.gpu_cases import FAMILIES, TINY
from benchmarks.gpu_clocks import EventClock, HostClock
from benchmarks.gpu_device import backend_of, driver_state
from benchmarks.gpu_layers import PRECISIONS, Rig
from benchmarks.gpu_plot import draw, drawn
from benchmarks.gpu_report import OK, Report, resumed
from benchmarks.gpu_run import ALL, CHOSEN, Course, Lost, cases_of
from benchmarks.gpu_stream import DTYPES_SENT, Stretch
from benchmarks.gpu_table import means, write
from convservice_backends.cuda.algorithms import NAMES, base
from convservice_backends.cuda.backend import CudaBackend

RESULTS = Path(__file__).parent / "results"


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
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.plot is not None:
        return _plot(options.plot)
    if not any(True for _ in cases_of(options)):
        parser.error("--families, --batches and --cases leave no case")
    with ExitStack() as stack:
        backend = stack.enter_context(closing(backend_of(options.device)))
        header = _header(backend, options)
        try:
            path = _path(options, header["device"])
            report = resumed(options.resume, header, timed=not options.only_validate)
        except (OSError, ValueError, TypeError, KeyError) as exc:  # whatever a file may hold
            parser.error(f"{type(exc).__name__}: {exc}")
        emulated = options.device == "emulator"
        rig = emulated_rig(backend) if emulated else gpu_rig(stack, backend, options.seconds)
        gone = _measure(Course(rig, report, options, path), options)
        if not emulated:
            header["nvidia-smi after"] = driver_state(_bus())
        write(report, path)
    return _end(report, path, gone)


def _measure(course: Course, options: argparse.Namespace) -> str:
    """Measures; hands on why the device has failed for good, if it has."""
    try:
        if not options.only_stream:
            if not options.only_validate:
                course.peaks()
            course.cases()
        if not options.no_stream:
            course.stream(_stretches(options))
    except Lost as exc:
        return str(exc)
    return ""


def _end(report: Report, path: Path, gone: str) -> int:
    """Says what came out and draws it; the program's status."""
    for line in means(report):
        print(line)
    if drawn(report):
        draw(report, path.with_suffix(".png"))
    print(path.with_suffix(".md"))
    if gone:
        print(f"the device has failed for good: {gone}", file=sys.stderr)
        print(f"to go on behind what failed: --resume {path.with_suffix('.json')}", file=sys.stderr)
    bad = [row for row in report.rows if row.status != OK]
    bad_stream = [figures for figures in report.stream if "status" in figures]
    return 1 if bad or bad_stream or gone else 0


def _plot(kept: Path) -> int:
    report, path = Report.read(kept), kept.with_suffix(".png")
    if not drawn(report):
        print(f"{kept} has no ratio to cuDNN to draw", file=sys.stderr)
        return 1
    draw(report, path)
    print(path)
    return 0


def _path(options: argparse.Namespace, device: str) -> Path:
    """Where results are kept, without suffix.

    Raises:
        ValueError: there is a file already that this run does not go on with.
    """
    path: Path = options.output or RESULTS / f"gpu-{model_of(device)}"
    if options.resume and options.output is None:
        path = options.resume[0].with_suffix("")
    kept = path.with_suffix(".json")
    if kept.exists() and kept.resolve() not in {each.resolve() for each in options.resume}:
        raise ValueError(f"{kept} is there already: go on with it (--resume), or write elsewhere (--output)")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [family.name for family in (*FAMILIES, TINY)]
    parser.add_argument("--device", choices=("cupy", "emulator"), default="cupy")
    parser.add_argument("--families", nargs="+", choices=known, help="all of the real ones where not given")
    parser.add_argument("--batches", nargs="+", type=int, help="only those of a family's")
    parser.add_argument("--cases", type=re.compile, help="only cases whose name this expression finds")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS))
    parser.add_argument(
        "--algorithms",
        type=_algorithms,
        default=(ALL,),
        help="all, chosen, or names with commas between them",
    )
    parser.add_argument("--seconds", type=float, default=0.005, help="of work in one measurement")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further case begins")
    parser.add_argument("--only-validate", action="store_true", help="time no layer")
    parser.add_argument("--no-peer", action="store_true", help="without cuDNN")
    parser.add_argument("--no-channels-last", action="store_true", help="without cuDNN's other layout")
    streams = parser.add_mutually_exclusive_group()
    streams.add_argument("--no-stream", action="store_true", help="without the stream of images")
    streams.add_argument("--only-stream", action="store_true", help="the stream of images alone")
    parser.add_argument("--images", type=int, default=64, help="of the stream")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="JSON",
        action="append",
        default=[],
        help="go on with a kept result; may be given several times",
    )
    parser.add_argument(
        "--output", type=Path, help="path without suffix; else that of --resume, or results/gpu-MODEL"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="JSON", help="draw the plot of a kept result, and no more"
    )
    return parser


def _algorithms(text: str) -> tuple[str, ...]:
    """Names of algorithms, or what stands for several of them."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown and names not in {(ALL,), (CHOSEN,)}:
        raise argparse.ArgumentTypeError(
            f"there is no {', '.join(map(repr, unknown))}: {ALL}, {CHOSEN}, or some of {', '.join(NAMES)}"
        )
    return names


def emulated_rig(backend: CudaBackend) -> Rig:
    """The device that stands in for a GPU, measured by the host's clock."""
    device = backend.contexts[0].device
    stream = device.stream()
    return Rig(device, stream, NumpyArrays(stream), HostClock(stream))


def gpu_rig(stack: ExitStack, backend: CudaBackend, seconds: float) -> Rig:
    """PyTorch and the backend on the same device, in streams of their own."""
    arrays = TorchArrays()
    torch = arrays.torch
    device = backend.contexts[0].device
    stream: Any = device.stream()
    outer = torch.cuda.ExternalStream(stream.stream.ptr)
    clock = EventClock(torch, outer, seconds)
    peer = EventClock(torch, torch.cuda.current_stream(), seconds)
    stack.callback(_settle, torch)
    return Rig(device, stream, arrays, clock, peer)


def _settle(torch: Any) -> None:
    """Waits for all work before memory goes; on a device that has failed there is none to wait for."""
    with suppress(Exception):
        torch.cuda.synchronize()


def _header(backend: CudaBackend, options: argparse.Namespace) -> dict[str, str]:
    described = backend.describe()
    versions = dict(described.versions)
    state: dict[str, str] = {}
    if options.device == "cupy":
        torch = importlib.import_module("torch")
        versions |= {"torch": str(torch.__version__), "torch's CUDA": str(torch.version.cuda)}
        versions["cuDNN"] = str(torch.backends.cudnn.version())
        state["nvidia-smi before"] = driver_state(_bus())
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    return {
        "device": described.device,
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "kernels": kernels_digest(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "options": ", ".join(_said(options)),
        **state,
    }


def _said(options: argparse.Namespace) -> Iterator[str]:
    """The options that have a value, in words."""
    given: dict[str, Any] = vars(options)
    for name, value in sorted(given.items()):
        if value and name != "output":
            several = name in {"algorithms", "batches", "families", "precisions", "resume"}
            text = " ".join(map(str, value)) if several else getattr(value, "pattern", value)
            yield f"{name.replace('_', '-')} {text}"


def _bus() -> str:
    """Where the GPU is on the PCI bus."""
    return str(importlib.import_module("cupy").cuda.Device(0).pci_bus_id)


def _stretches(options: argparse.Namespace) -> list[Stretch]:
    if options.device == "emulator":
        return [Stretch(3, (3, 12, 16), 4, dtype, repeats=1) for dtype in DTYPES_SENT]
    return [Stretch(options.images, dtype=dtype) for dtype in DTYPES_SENT]


if __name__ == "__main__":
    sys.exit(main())
