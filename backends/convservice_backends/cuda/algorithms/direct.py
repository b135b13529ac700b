"""direct: one output a thread. Fits everything; the readable one, chosen where nothing faster fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.geometry import SampleShape
from convservice_backends.cuda.algorithms.base import Case, Problem, ceil_div, filters_as, float_types
from convservice_backends.cuda.device import Launch
from convservice_backends.cuda.source import Kernel, type_constants, type_label

THREADS = 128
MOST_ALONG_Y = 65_535
"""Blocks that a grid may have along y and along z."""


class Direct:
    """Product by product, in the order channel, then weight."""

    name: ClassVar[str] = "direct"
    packing = ()
    quantum = 1

    def __init__(self, case: Case) -> None:
        self._case = case

    @classmethod
    def fits(cls, case: Case) -> bool:
        """Always."""
        return True

    @classmethod
    def kernels(cls) -> Iterator[Kernel]:
        """One for each pair of types."""
        for given, out in float_types():
            yield _kernel(given, out)

    def pack(self) -> NDArray[Any]:
        """(groups, group_out, group_in, taps) in the type of the sums."""
        return filters_as(self._case.layer, self._case.sums)

    def scratch_bytes(self, sample: SampleShape, rows: int, samples: int) -> int:
        """None."""
        return 0

    def launches(self, problem: Problem) -> Iterator[Launch]:
        """One thread an output; grids cut off at what hardware takes, the kernel goes round."""
        arguments = problem.arguments
        grid = (
            ceil_div(arguments.positions, THREADS),
            min(arguments.groups * arguments.group_out, MOST_ALONG_Y),
            min(arguments.samples, MOST_ALONG_Y),
        )
        yield Launch(_kernel(self._case.given, problem.out), grid, arguments, problem.holds)


def _kernel(given: DType, out: DType) -> Kernel:
    return Kernel("direct", type_label(given, out), THREADS, type_constants(given, out))
