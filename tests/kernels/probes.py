"""Kernels of a few lines, to test the emulator itself."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice_emulator.build import Compiler, cpp_of

Array = NDArray[Any]

TEXT = """
#define KERNEL probe
#define THREADS {threads}
{before}
struct Probe {{ void* given; void* out; long long count; }};
extern "C" __global__ void KERNEL(const Probe a) {{
  const {given}* given = static_cast<const {given}*>(a.given);
  {out}* out = static_cast<{out}*>(a.out);
  const int thread = threadIdx.x;
  {body}
}}
"""

C_NAMES = {
    "float32": "float",
    "uint32": "unsigned",
    "int32": "int",
    "uint16": "unsigned short",
    "uint8": "unsigned char",
}


class ProbeArguments(ctypes.Structure):
    """What a probe is given."""

    _fields_ = (("given", ctypes.c_uint64), ("out", ctypes.c_uint64), ("count", ctypes.c_int64))


def probe(
    compiler: Compiler,
    body: str,
    given: Array,
    out: Array,
    *,
    before: str = "",
    threads: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    dynamic_bytes: int = 0,
    order: int = 0,
) -> Array:
    """Runs a kernel on `given` and `out`, whose dtypes are the types of its pointers of those names.

    Args:
        compiler: of the kernel.
        body: what it does; `thread` is the thread's number, `a.count` the elements of `given`.
        given: what it reads.
        out: what it writes.
        before: put before the kernel.
        threads: of a block.
        grid: blocks along x, y and z.
        dynamic_bytes: dynamic shared memory of a block.
        order: of threads and blocks.

    Returns:
        `out`.
    """
    names = {"given": C_NAMES[given.dtype.name], "out": C_NAMES[out.dtype.name]}
    text = TEXT.format(threads=threads, before=before, body=body, **names)
    library = compiler.library_of(cpp_of(text, "Probe"), "probe")
    arguments = ProbeArguments(given.ctypes.data, out.ctypes.data, given.size)
    library.launch(bytes(arguments), grid, dynamic_bytes, order)
    return out


def lanes(count: int, dtype: str) -> Array:
    """An array for results, which no kernel has written."""
    return np.full(count, 77, dtype)
