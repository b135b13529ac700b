"""Running sums on a device: what layers that need all rows of a sample share.

A `SummingOperator` takes in rows as they come and keeps one sum an output. Rows are cut into blocks at
absolute multiples, each block's part of a sum is computed in a fixed tree by a kernel of the layer's own, and
`fold` adds parts to the sums in their order (kernels/parts.cuh): bits depend neither on how many rows come at
a time nor on what else is computed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import Any, ClassVar

from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.errors import InternalError, Reason
from convservice.geometry import SampleShape
from convservice.layers import FUNCTIONS, Activation
from convservice_backends.cuda import pieces
from convservice_backends.cuda.algorithms.base import ceil_div, float_types
from convservice_backends.cuda.arguments import FoldArguments, PartsArguments
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import Launch, Memory
from convservice_backends.cuda.elementwise import LINEAR
from convservice_backends.cuda.source import Kernel, type_constants, type_label
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Run
from convservice_backends.plan import BlockPlan

THREADS = 128

TERMS = 2048
"""Elements or products of one part at most: enough for its warp, few enough for many warps."""

MOST_TERMS = 1 << 30
"""Of one block: kernels count them with 32 bits, some steps beyond the last."""

MOST_PARTS_BYTES = 32 << 20
"""Working memory for parts, unless those of one block of one sample take more."""


class SummingOperator(ABC):
    """A layer whose outputs are sums, or largest values, over a sample's rows.

    Args:
        given: dtype of the rows it reads, a float type.
        sample: shape of the samples it is given; its rows are not looked at.
        outputs: of one sample.
        block_rows: rows of a block.
        block_terms: elements or products of one output in a block.
    """

    name: ClassVar[str]

    def __init__(
        self, given: DType, sample: SampleShape, outputs: int, *, block_rows: int, block_terms: int
    ) -> None:
        pieces.check_positions(block_terms, MOST_TERMS, "what one sum takes in at a time")
        self._given = given
        self._sums = given.accumulator
        self._row = math.prod(sample.rest)
        self._outputs = outputs
        self._block_rows = block_rows
        self._block_parts = ceil_div(block_terms, TERMS)

    @property
    def packing(self) -> tuple[Hashable, ...]:
        """What its weights on the device depend on beside the layer."""
        return (self._given, self.name)

    def weights(self) -> tuple[NDArray[Any], ...]:
        """What has to be on the device."""
        return ()

    @property
    def thresholds(self) -> int | None:
        """Which of its weights are the thresholds."""
        return None

    @property
    def maximum(self) -> bool:
        """Whether the larger one is kept, not the sum."""
        return False

    @property
    def activation(self) -> Activation:
        """What follows the sums."""
        return LINEAR

    def divisor(self, elements: int) -> float:
        """What the sum of so many elements of a channel is divided by."""
        return 1.0

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Rows of the input that are taken in together."""
        return BlockPlan(self.name, self._block_rows, out.rest, 0)

    def sums(self, given: SampleShape, out: SampleShape) -> tuple[tuple[int, ...], DType]:
        """One an output."""
        return (out.channels, 1), self._sums

    def scratch_bytes(self, out: SampleShape, rows: int, samples: int) -> int:
        """Working memory for at most so many input rows of so many samples."""
        wanted = samples * ceil_div(rows, self._block_rows) * self._block_bytes
        return min(wanted, max(MOST_PARTS_BYTES, self._block_bytes))

    def library_bytes(self, out: SampleShape) -> int:
        """None."""
        return 0

    @property
    def _block_bytes(self) -> int:
        """Of the parts of one block of one sample."""
        return self._block_parts * self._outputs * self._sums.itemsize

    def accumulate(
        self,
        run: Run,
        sums: DeviceArray | None,
        out: DeviceArray,
        workspace: DeviceWorkspace,
        weights: tuple[Memory, ...],
    ) -> None:
        """Takes in input rows first <= i < last, as many samples and blocks at a time as there is working
        memory for."""
        held = run.rows[:, :, run.first - run.first_row : run.last - run.first_row]
        room = 0 if workspace.scratch is None else workspace.scratch.nbytes // self._block_bytes
        if sums is None or not room:
            raise InternalError(
                f"the parts of a block take {self._block_bytes} bytes of working memory, more than planned",
                reason=Reason.INTERNAL,
            )
        samples = min(held.shape[0], room)
        rows = room // samples * self._block_rows
        for sample in range(0, held.shape[0], samples):
            for row in range(0, held.shape[2], rows):
                taken = held[sample : sample + samples, :, row : row + rows]
                self._take_in(taken, run.first + row, sums[sample : sample + samples], workspace, weights)
                workspace.check()

    def finish(
        self,
        height: int,
        sums: DeviceArray | None,
        out: DeviceArray,
        workspace: DeviceWorkspace,
        weights: tuple[Memory, ...],
    ) -> None:
        """Writes the output row."""
        if sums is None:
            raise InternalError("a reduction has its sums", reason=Reason.INTERNAL)
        arguments = FoldArguments(
            sums=sums.address,
            thresholds=0 if self.thresholds is None else weights[self.thresholds].address,
            output=out.address,
            output_sample=out.strides[0],
            output_channel=out.strides[1],
            samples=sums.shape[0],
            outputs=self._outputs,
            activation=FUNCTIONS.index(self.activation.function),
            divisor=self.divisor(height * self._row),
            slope=self.activation.negative_slope,
        )
        holds = (sums.memory, out.memory, *weights)
        workspace.stream.launch(_fold_launch(arguments, self._sums, out.dtype, holds))
        workspace.check()

    def _take_in(
        self,
        rows: DeviceArray,
        first: int,
        sums: DeviceArray,
        workspace: DeviceWorkspace,
        weights: tuple[Memory, ...],
    ) -> None:
        """Adds whole blocks of rows, or the last, to the sums."""
        if workspace.scratch is None:
            raise InternalError("parts have their working memory", reason=Reason.INTERNAL)
        parts = ceil_div(rows.shape[2], self._block_rows) * self._block_parts
        arguments = PartsArguments(
            input=rows.address,
            parts=workspace.scratch.address,
            input_sample=rows.strides[0],
            input_channel=rows.strides[1],
            row=self._row,
            samples=rows.shape[0],
            channels=rows.shape[1],
            outputs=self._outputs,
            rows=rows.shape[2],
            block_rows=self._block_rows,
            block_parts=self._block_parts,
            parts_at_all=parts,
        )
        kernel, grid = self._part_launch(arguments, first, weights)
        holds = (rows.memory, sums.memory, workspace.scratch, *weights)
        workspace.stream.launch(Launch(kernel, grid, arguments, holds))
        fold = FoldArguments(
            parts=arguments.parts,
            sums=sums.address,
            samples=rows.shape[0],
            outputs=self._outputs,
            count=parts,
            begins=first == 0,
            maximum=self.maximum,
            divisor=1.0,
        )
        workspace.stream.launch(_fold_launch(fold, self._sums, self._sums, holds))

    @abstractmethod
    def _part_launch(
        self, arguments: PartsArguments, first: int, weights: tuple[Memory, ...]
    ) -> tuple[Kernel, tuple[int, int, int]]:
        """The kernel that computes the parts of rows from `first` on, and its grid; completes arguments."""


def every_kernel() -> Iterator[Kernel]:
    """All forms of `fold`."""
    for sums, out in dict.fromkeys((given.accumulator, out) for given, out in float_types()):
        yield _fold_kernel(sums, out)


def _fold_kernel(sums: DType, out: DType) -> Kernel:
    return Kernel("fold", type_label(sums, out), THREADS, type_constants(sums, out), "fold")


def _fold_launch(arguments: FoldArguments, sums: DType, out: DType, holds: tuple[Memory, ...]) -> Launch:
    blocks = ceil_div(arguments.samples * arguments.outputs, THREADS)
    return Launch(_fold_kernel(sums, out), (min(blocks, 1 << 20), 1, 1), arguments, holds)
