"""A test of the tests: faults planted in the kernels' text must each be seen.

A fault is seen by other bits in one of three scheduling orders, by a failed launch, or by a sanitizer.
Without their fault the same launches are clean, which `test_sanitizers` shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from itertools import islice

import numpy as np
import pytest

from benchmarks.gpu_layer_problems import LayerProblem
from convservice_emulator.build import Compiler
from convservice_emulator.recording import Recorded
from convservice_emulator.sanitizers import Sanitizer
from tests.kernels.samples import EVERY, recorded, recorded_copy

ORDERS = (0, 1, 2)

WAITS = re.compile(r"(__syncthreads\(\)|copy_async_wait<[^>]*>\(\));")
"""A barrier, or a wait for asynchronous copies."""

UNNEEDED = {("tensor_core", "copy_async_wait<0>()")}
"""File and wait after which nothing can be under way: the groups that it waits for are empty."""

MOST_WAITS = 8
"""In one kernel file, headers included."""

EDITS = (
    ("direct", "at >= (unsigned)a.positions) return", "at > (unsigned)a.positions) return"),
    ("direct", "at < axis.high) return", "at <= axis.high) return"),
    ("depthwise", "coordinate < axis.high) return", "coordinate <= axis.high) return"),
    ("elementwise", "i < a.elements;", "i <= a.elements;"),
    ("implicit_gemm", "own_filter >= a.group_out) continue", "own_filter > a.group_out) continue"),
    ("reduce", "i < all;", "i <= all;"),
    ("depthwise", "r >= rows) continue", "r > rows) continue"),
    ("stage", "channel * a.input_channel + at", "(channel + 1) * a.input_channel + at"),
    ("tensor_core", "row < rows;", "row <= rows;"),
    ("fourier", "first + f >= a.group_out) continue", "first + f > a.group_out) continue"),
    ("winograd", "filter < a.group_out) finish_tile", "filter <= a.group_out) finish_tile"),
    ("winograd", "tile.row + i >= rows) continue", "tile.row + i > rows) continue"),
    ("pool", "planes.item >= (unsigned)w.positions) return", "planes.item > (unsigned)w.positions) return"),
    ("pool", "if (last >= axis.high) stop", "if (last > axis.high) stop"),
    ("transposed", "first + f < a.group_out) finish", "first + f <= a.group_out) finish"),
    ("transposed", "if (input >= axis.high) {", "if (input > axis.high) {"),
    ("local", "planes.item >= (unsigned)a.positions) return", "planes.item > (unsigned)a.positions) return"),
    ("local", "at >= 0 && first + s < a.samples", "at >= 0 && first + s <= a.samples"),
    ("add", "i < a.elements;", "i <= a.elements;"),
    ("global_pool", "i + turn * LANES < part.end)", "i + turn * LANES <= part.end)"),
    ("linear", "i < part.end;", "i <= part.end;"),
    ("fold", "i < maps;", "i <= maps;"),
)
"""File, what stands there once, and what is planted in its place: a guard that lets one too many through."""

FILES = tuple(dict.fromkeys(file for file, *_ in EDITS))
KERNELS = resources.files("convservice_backends.cuda").joinpath("kernels")
WAITING = tuple(file for file in FILES if WAITS.search(KERNELS.joinpath(f"{file}.cu").read_text("utf-8")))


def launches(compiler: Compiler, file: str) -> Iterator[Recorded]:
    """Recorded launches of a kernel file."""
    if file == "elementwise":
        yield recorded_copy(compiler, False)
        return
    owners = {"reduce": "implicit_gemm", "stage": "tensor_core", "fold": "global_pool"}
    for sample in EVERY:
        owner = sample.recipe.kernel if isinstance(sample, LayerProblem) else sample.algorithm
        if owner == owners.get(file, file):
            yield from (launch for launch in recorded(compiler, sample) if launch.kernel.file == file)


def seen_by(sanitizers: tuple[Sanitizer, ...], launch: Recorded, source: str) -> str:
    """What saw a fault in a launch's text; empty where nothing did."""
    plain, *watching = sanitizers
    for order in ORDERS:
        report = plain.run(launch, source, order)
        if report.text:
            return report.text
        pairs = zip(report.buffers, launch.buffers, strict=True)
        if not all(np.array_equal(found, buffer.after) for found, buffer in pairs):
            return f"other bits in order {order}"
    return next((text for each in watching if (text := each.run(launch, source).text)), "")


def without_wait(source: str, index: int) -> str | None:
    """A text without one of its waits, counted from the first; None where it has no more."""
    found = next(islice(WAITS.finditer(source), index, None), None)
    return None if found is None else source[: found.start()] + ";" + source[found.end() :]


def wait_of(source: str, index: int) -> str:
    """One of a text's waits."""
    return next(islice(WAITS.finditer(source), index, None)).group(1)


@pytest.mark.slow
@pytest.mark.parametrize("file", WAITING)
def test_a_wait_left_out_is_seen(compiler: Compiler, sanitizers: tuple[Sanitizer, ...], file: str) -> None:
    sources = {launch.kernel.source for launch in launches(compiler, file)}
    assert sources, f"no sample launches {file}"
    count = max(len(WAITS.findall(source)) for source in sources)
    assert count <= MOST_WAITS, "each of them costs seconds"
    for index in range(count):
        waits = {wait_of(source, index) for source in sources}
        if all((file, wait) in UNNEEDED for wait in waits):
            continue
        planted = ((each, without_wait(each.kernel.source, index)) for each in launches(compiler, file))
        assert any(seen_by(sanitizers, each, source) for each, source in planted if source), (
            file,
            index,
            waits,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("file", "guard", "fault"), EDITS)
def test_one_too_many_is_seen(
    compiler: Compiler, sanitizers: tuple[Sanitizer, ...], file: str, guard: str, fault: str
) -> None:
    found = list(launches(compiler, file))
    planted = [
        (each, each.kernel.source.replace(guard, fault)) for each in found if guard in each.kernel.source
    ]
    assert planted, f"{file} has no {guard!r} any more: plant the fault elsewhere"
    assert any(seen_by(sanitizers, each, source) for each, source in planted)


def test_every_kernel_file_has_a_fault() -> None:
    there = {name.removesuffix(".cu") for path in KERNELS.iterdir() if (name := path.name).endswith(".cu")}
    assert there == set(FILES)
