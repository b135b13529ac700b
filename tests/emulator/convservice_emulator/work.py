"""How much arithmetic emulated devices have done, by which tests are held to what the emulator is for.

`multiply_adds` is given a launch, that is a kernel and its arguments, and says for how many products of a
layer it stands; `DONE` adds them up over all devices of the process.
"""

from __future__ import annotations

import math
import threading

from convservice_backends.cuda.arguments import ConvArguments, PartsArguments
from convservice_backends.cuda.source import Kernel

HELPING = ("reduce", "stage")
"""Kernel files that sum or put in place what another launch of the same convolution is counted for."""


class Count:
    """A number that only grows; any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _total
        self._total = 0

    @property
    def total(self) -> int:
        """All that was ever added."""
        with self._lock:
            return self._total

    def add(self, count: int) -> None:
        """Adds."""
        with self._lock:
            self._total += count


DONE = Count()
"""Multiply-adds done in this process."""


def multiply_adds(kernel: Kernel, arguments: bytes) -> int:
    """Products that a launch computes, padding included, of pooling the elements looked at; none are saved by
    transforms.

    0 for a launch that helps another, so that each layer counts once.
    """
    if kernel.file == "linear":
        parts = PartsArguments.from_buffer_copy(arguments)
        return int(parts.samples * parts.outputs * parts.channels * parts.rows * parts.row)
    if kernel.takes not in {"conv", "pool"} or kernel.file in HELPING:
        return 0
    a = ConvArguments.from_buffer_copy(arguments)  # a pooling's begin with them
    if kernel.file == "fourier" and (a.split_depth or ("FINISH", 1) not in kernel.constants):
        return 0  # of several kernels and batches of tiles, the first batch's last
    taps = a.taps
    if kernel.file == "transposed":  # an output looks with every stride-th weight along each axis
        taps = math.prod(-(-axis.kernel // axis.stride) for axis in a.axes)
    return int(a.samples * a.positions * a.groups * a.group_out * a.group_in * taps)
