"""The process a server runs in: what must be set before NumPy is imported, and how memory is handed back.

BLAS reads its number of threads when it is loaded. A server wants one (blocks run on the backend's own
workers, and the bits of a product must not depend on how busy they are), so `one_blas_thread` sets the
variables and, where NumPy is loaded already, starts the same command over in the same process: `execv` keeps
the process's id and its standard streams. `open_standard_streams` gives a process that was started without
them others that lead nowhere. `keep_freed_memory` tells glibc to reuse buffers of the size of a
message instead of returning each to the kernel and faulting its pages in anew, which is what costs most in
moving tensors.
"""

from __future__ import annotations

import ctypes
import os
import sys

BLAS_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_REUSED_BYTES = 32 << 20
"""Buffers up to this size are reused: messages, bands and blocks are smaller. It is also glibc's own
maximum."""
_KEPT_BYTES = 64 << 20
"""Free memory at the end of a heap that is kept for reuse rather than given back."""
_ARENAS = 2
"""Heaps; each keeps what it has for reuse, so that many heaps would keep many times as much."""


def open_standard_streams() -> None:
    """Opens the standard streams that are closed, to nowhere.

    Else the next connection would get such a stream's number, and with it whatever a library writes there.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least number that is free, and so this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - stays open


def one_blas_thread() -> None:
    """Sets BLAS to one thread for this process, starting its command over if NumPy is loaded already."""
    if all(os.environ.get(name) == "1" for name in BLAS_VARIABLES):
        return
    os.environ.update(dict.fromkeys(BLAS_VARIABLES, "1"))
    if "numpy" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very command


def keep_freed_memory() -> None:
    """Makes glibc reuse the memory of message-sized buffers; does nothing with another C library."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, _REUSED_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_ARENA_MAX, _ARENAS)
