"""Global pooling and flattening on the processor: a sample's rows are taken in, block after block.

Blocks of rows are cut at absolute multiples and added in their order, so that neither the cut into bands nor
the batch changes a bit. Means are summed in float64, pairwise within a block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import FLOAT64, DType
from convservice.geometry import SampleShape
from convservice.layers import Flatten, GlobalAvgPool, GlobalMaxPool
from convservice_backends.numpy.blocks import aligned, carve
from convservice_backends.numpy.elementwise import CONVERTED_ELEMENTS, copy_rounded, store, temporary_bytes
from convservice_backends.numpy.pooling import same_zeros_and_nans
from convservice_backends.operators import Run, Task, Workspace
from convservice_backends.plan import BlockPlan

BLOCK_ELEMENTS = 1 << 17
"""Input elements of a block of rows over all channels."""

PIECE_ELEMENTS = 1 << 14
"""Elements of one channel that are summed pairwise."""


class GlobalPoolOperator:
    """Global max or average pooling.

    Args:
        layer: the layer.
        accumulator: the type of the results before they are rounded; means are summed in float64.
    """

    nbytes = 0

    def __init__(self, layer: GlobalMaxPool | GlobalAvgPool, accumulator: DType) -> None:
        self._is_max = isinstance(layer, GlobalMaxPool)
        self._kept = accumulator if self._is_max else FLOAT64

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Rows enough for a sum worth calling for, no more than are worth holding."""
        positions = math.prod(given.rest)
        rows = max(1, min(PIECE_ELEMENTS // positions, BLOCK_ELEMENTS // given.row_elements))
        # A sample lower than a block has more channels to a task: up to a piece, whatever its height.
        elements = min(PIECE_ELEMENTS, rows * given.row_elements)
        # Where a row is larger than a piece, the row of a channel may have to be laid out.
        laid_out = positions * FLOAT64.itemsize if positions > PIECE_ELEMENTS else 0
        scratch = aligned(elements, self._kept.numpy)
        return BlockPlan(
            "blockwise", rows, out.rest, scratch, temporary_bytes(given.channels, FLOAT64) + laid_out
        )

    @staticmethod
    def _channels(given: SampleShape, rows: int) -> int:
        """Channels that one task reduces."""
        elements = rows * min(math.prod(given.rest), PIECE_ELEMENTS)
        return max(1, min(given.channels, PIECE_ELEMENTS // elements))

    def sums(self, given: SampleShape, out: SampleShape) -> tuple[tuple[int, ...], DType]:
        """One number per channel."""
        return (given.channels,), self._kept

    def accumulate(self, run: Run, sums: NDArray[Any], out: NDArray[Any], workspace: Workspace) -> None:
        """Takes in input rows first <= i < last, a block after the other."""
        if run.first == 0:
            sums.fill(-np.inf if self._is_max else 0)
        samples, channels, _, *rest = run.rows.shape
        step = self._channels(SampleShape(channels, None, tuple(rest)), run.blocks.rows)
        tasks = [
            self._task(run, sums, sample, slice(first, min(first + step, channels)), workspace)
            for sample in range(samples)
            for first in range(0, channels, step)
        ]
        workspace.run(tasks, float(samples * channels * (run.last - run.first) * math.prod(rest)))

    def _task(self, run: Run, sums: NDArray[Any], sample: int, channels: slice, workspace: Workspace) -> Task:
        def task(worker: int) -> None:
            held, kept = run.rows[sample, channels], sums[sample, channels]
            with np.errstate(all="ignore"):
                for first in range(run.first, run.last, run.blocks.rows):
                    last = min(first + run.blocks.rows, run.last)
                    rows = held[:, first - run.first_row : last - run.first_row]
                    self._take(rows, kept, workspace.scratch(worker))

        return task

    def _take(self, rows: NDArray[Any], kept: NDArray[Any], scratch: NDArray[np.uint8]) -> None:
        """Takes in one block of some channels, (channels, rows, *rest)."""
        elements = math.prod(rows.shape[1:])
        if elements <= PIECE_ELEMENTS:
            block = carve(scratch, rows.shape, self._kept.numpy)
            np.copyto(block, rows, casting="unsafe")
            self._combine(block.reshape(rows.shape[0], elements), kept)
            return
        for channel, sum_of in zip(rows, kept.reshape(-1, 1), strict=True):  # a row larger than a piece
            flat = channel.reshape(-1)
            for first in range(0, elements, PIECE_ELEMENTS):
                piece = flat[first : first + PIECE_ELEMENTS]
                block = carve(scratch, (1, piece.size), self._kept.numpy)
                np.copyto(block[0], piece, casting="unsafe")
                self._combine(block, sum_of)

    def _combine(self, block: NDArray[Any], kept: NDArray[Any]) -> None:
        if self._is_max:
            np.maximum(kept, np.maximum.reduce(block, axis=1), out=kept)
        else:
            np.add(kept, np.add.reduce(block, axis=1), out=kept)

    def finish(
        self, height: int, given: SampleShape, sums: NDArray[Any], out: NDArray[Any], workspace: Workspace
    ) -> None:
        """Divides, where it is a mean, and rounds."""
        workspace.run([], 0)
        with np.errstate(all="ignore"):
            if self._is_max:
                same_zeros_and_nans(sums)
            else:
                np.divide(sums, float(height) * math.prod(given.rest), out=sums)
            store(sums, out.reshape(sums.shape))


class FlattenOperator:
    """A feature map laid out as a vector: every row goes to its places as it comes.

    Args:
        layer: the layer.
        accumulator: the type through which elements are rounded to an integer result.
    """

    nbytes = 0

    def __init__(self, layer: Flatten, accumulator: DType) -> None:
        self._accumulator = accumulator

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows."""
        return BlockPlan("copy", 1, out.rest, 0, temporary_bytes(2 * CONVERTED_ELEMENTS, self._accumulator))

    def sums(self, given: SampleShape, out: SampleShape) -> None:
        """Nothing: the output itself is filled."""
        return

    def accumulate(self, run: Run, sums: None, out: NDArray[Any], workspace: Workspace) -> None:
        """Copies input rows first <= i < last to their places."""
        samples, channels, _, *rest = run.rows.shape
        places = out.reshape(samples, channels, run.known_height, *rest)
        rows = run.rows[:, :, run.first - run.first_row : run.last - run.first_row]
        into = places[:, :, run.first : run.last]

        workspace.run([], 0)
        if out.dtype.kind not in "iu":  # rounded as they are copied
            with np.errstate(all="ignore"):
                np.copyto(into, rows, casting="unsafe")
            return
        for source, target in zip(rows, into, strict=True):
            copy_rounded(source, target, self._accumulator)

    def finish(
        self, height: int, given: SampleShape, sums: None, out: NDArray[Any], workspace: Workspace
    ) -> None:
        """Nothing is left to do."""
