"""tensor_core: implicit matrix product on tensor cores, for 16-bit rows always and for float32 under "fast".

Given a layer and the rows of a run, it first puts what the run reads channels-last (kernel `stage`), then
multiplies tiles of filters by tiles of positions (kernel `tensor_core`), tap by tap, channels inside, in
float32 accumulators. Of few channels, those at all weights along the innermost axis count as the channels of
one tap, so that less of what is multiplied is filling. Runs of 1x1 windows on 16-bit rows whose positions
follow one another are read as they are. Filters come packed in the order in which the kernel copies them.

Rounding. Products of 16-bit elements are exact, so the bound of 16-bit layers is that of float32 sums. Of
float32, the tensor cores multiply TF32: `stage` and `pack` round each operand to 11 digits, ties away from
zero, |x' - x| <= 2**-11 |x|; the sum of the rounded products differs from the exact by at most
(2 * 2**-11 + 2**-22) sum |x||w|, and its float32 additions by what any float32 sum may (with the rounded
operands' magnitude): together `tf32_roundoff(K)` times sum |x||w|. Operands from (2 - 2**-11) * 2**127 on
become infinite. Integers below 2**11 in magnitude stay exact. How an instruction rounds the additions within
it, PTX leaves to the device: the bound of float32 sums is to be confirmed on each, by the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import FLOAT32
from convservice.errors import InternalError, Reason
from convservice.geometry import SampleShape
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms.base import Case, Problem, ceil_div, filters_as, square_positions
from convservice_backends.cuda.algorithms.gemm_tiles import reduce_kernel
from convservice_backends.cuda.algorithms.staging import AxisStaging, row_start, staged_axes
from convservice_backends.cuda.algorithms.tensor_core_forms import (
    CHUNK_BYTES,
    FILTERS_TOGETHER,
    MINIMUM,
    ROW_CHUNKS,
    TILES,
    Form,
    Tile,
    forms,
    stage_kernel,
)
from convservice_backends.cuda.arguments import ConvArguments
from convservice_backends.cuda.device import Launch, Memory
from convservice_backends.cuda.source import Kernel

ALIGNMENT = 256
"""Parts of the working memory begin at a multiple of so many bytes."""

MOST_CHUNKS = 1 << 29
"""Staged chunks of the rows under one output row, at most: a launch's chunks are numbered in 32 bits."""

MOST_ALONG_Y = 65_535
"""Blocks that a grid may have along y and along z."""

MOST_BLOCKS = 1 << 20
"""Blocks of a `reduce`, which goes round."""

STAGE_BLOCKS = 4
"""Blocks of a `stage` that a multiprocessor runs at once; with more, each goes through several samples."""

MOST_MERGED = 64
"""Elements of one place, at most, where channels are merged with the weights along the innermost axis."""

SPLIT_BLOCKS, SPLIT_TILE, SPLIT_DEPTH, MOST_SPLITS = 128, 64, 8, 8
"""A sum is split while one sample has fewer blocks of 64 x 64 than this, into parts of at least so many tiles
of terms, and at most so many parts."""


class TensorCore:
    """Tile by tile, products of 16 x 8 x 16 (TF32: 16 x 8 x 8) elements at once.

    Args:
        case: the layer in its place.
        tile: one of `TILES` to compute everything with, by name, where a test wants it.
        folded: whether one block sums all parts of a split sum; else as suits the launch.
    """

    name: ClassVar[str] = "tensor_core"
    packing = ()
    quantum = 1

    def __init__(self, case: Case, *, tile: str | None = None, folded: bool | None = None) -> None:
        self._case = case
        self._tile = tile
        self._folded = folded
        self._chunk = CHUNK_BYTES // case.given.itemsize  # elements
        inner = case.layer.kernel[-1]
        self._merged = case.group_in < self._chunk and 1 < inner <= MOST_MERGED // case.group_in
        self._together = inner * case.group_in if self._merged else case.group_in  # elements of a tap
        self._group_chunks = ceil_div(self._together, self._chunk)
        self._taps = math.prod(case.layer.kernel) // (inner if self._merged else 1)
        self._depth = ceil_div(self._taps * self._group_chunks, ROW_CHUNKS)  # tiles of terms

    @classmethod
    def fits(cls, case: Case) -> bool:
        """16-bit rows, and float32 rows under "fast".

        Groups narrower than a chunk are left to others, as most products would be padding; a dense layer of
        few channels is not.
        """
        if case.given not in MINIMUM or case.architecture < MINIMUM[case.given]:
            return False
        if case.given == FLOAT32 and case.precision is not Precision.FAST:
            return False
        chunk = CHUNK_BYTES // case.given.itemsize
        if case.layer.groups > 1 and case.group_in < chunk:
            return False
        chunks = max(case.layer.groups * ceil_div(case.group_in, chunk), MOST_MERGED // chunk)
        row = ceil_div(case.row_elements, case.layer.in_channels) * chunks
        return row * (case.rows_under_one + 2) < MOST_CHUNKS and chunks <= 8 * MOST_ALONG_Y

    @classmethod
    def kernels(cls) -> Iterator[Kernel]:
        """Staging for each type, every tile for each pair of types."""
        for given in MINIMUM:
            yield stage_kernel(given, merged=False)
            yield stage_kernel(given, merged=True)
            for out in {given: None, given.accumulator: None}:
                yield reduce_kernel(given, out)
                for form in forms(given):
                    yield form.kernel(given, out)

    def pack(self) -> NDArray[Any]:
        """(groups, filters / 32, terms / tile, 32, terms of a tile): tap by tap, filled up with zeros."""
        layer, case = self._case.layer, self._case
        filters = filters_as(layer, case.given)
        if case.given == FLOAT32:
            filters = rounded_tf32(filters)
        groups, group_out = filters.shape[:2]
        together = filters.transpose(0, 1, 3, 2).reshape(groups, group_out, self._taps, self._together)
        filled = self._group_chunks * self._chunk
        terms = np.zeros((groups, self._padded_filters, self._taps, filled), filters.dtype)
        terms[:, :group_out, :, : self._together] = together
        row = ROW_CHUNKS * self._chunk
        packed = np.zeros((groups, self._padded_filters, self._depth * row), filters.dtype)
        packed[:, :, : self._taps * filled] = terms.reshape(groups, self._padded_filters, -1)
        tiled = packed.reshape(groups, -1, FILTERS_TOGETHER, self._depth, row)
        return np.ascontiguousarray(tiled.transpose(0, 1, 3, 2, 4))

    def scratch_bytes(self, sample: SampleShape, rows: int, samples: int) -> int:
        """The staged rows, and the parts of split sums.

        An operator may compute more rows of fewer samples at once, up to one row more of all samples.
        """
        layer = self._case.layer
        counts = (rows + 1, *sample.rest)
        held = [
            (count - 1) * stride + max((kernel - 1) * dilation + 1, stride)
            for count, stride, kernel, dilation in zip(
                counts, layer.stride, layer.kernel, layer.dilation, strict=True
            )
        ]
        if self._merged:
            held[-1] = counts[-1]
        staged = samples * math.prod(held) * layer.groups * self._group_chunks * CHUNK_BYTES
        splits, _ = self._splits(sample)
        parts = splits * samples * (rows + 1) * sample.row_elements * 4 if splits > 1 else 0
        return _aligned(staged) + parts

    def launches(self, problem: Problem) -> Iterator[Launch]:
        """Staging where it is wanted, the products, and the sum of their parts where there are several."""
        case, given = self._case, problem.arguments
        splits, depth = self._splits(problem.sample)
        first = row_start(given, case.given.itemsize) if case.given.itemsize == 2 else None
        form = self._form(given, splits, problem.processors, channels_first=first is not None)
        parts = 1 if form.folded else splits
        staging = staged_axes(given, merged=self._merged) if first is None else ()
        staged = math.prod(axis.count for axis in staging) if staging else 0
        offset = _aligned(given.samples * staged * given.groups * self._group_chunks * CHUNK_BYTES)
        elements = given.samples * given.groups * given.group_out * given.positions
        scratch = _checked(problem.scratch, offset + (parts * elements * 4 if parts > 1 else 0))
        holds = problem.holds if scratch is None else (*problem.holds, scratch)
        address = 0 if scratch is None else scratch.address

        arguments = ConvArguments.from_buffer_copy(given)
        if first is not None:
            arguments.input = given.input + first * case.given.itemsize
        else:
            pitch = given.groups * self._group_chunks
            if staged:
                yield self._stage(given, staging, address, problem.processors, holds)
            _read_staged(arguments, staging, pitch, address)
            arguments.group_in, arguments.taps = self._together, self._taps
        arguments.scratch = address + offset
        arguments.filter_stride = self._padded_filters
        arguments.splits, arguments.split_depth = parts, depth * ROW_CHUNKS
        kernel = form.kernel(case.given, problem.out)
        yield Launch(kernel, (form.tile.blocks(given), parts, 1), arguments, holds)
        if parts > 1:
            kernel = reduce_kernel(case.given, problem.out)
            blocks = min(ceil_div(elements, kernel.threads), MOST_BLOCKS)
            yield Launch(kernel, (blocks, 1, 1), arguments, holds)

    @property
    def _padded_filters(self) -> int:
        """Filters of a group as packed: a multiple of every tile that may read them."""
        filters = self._case.group_out
        widest = next((size for size in (32, 64) if filters <= size), 128)
        return ceil_div(filters, widest) * widest

    def _splits(self, sample: SampleShape) -> tuple[int, int]:
        """Parts of a sum, and tiles of terms in each: of the layer and the width of its map."""
        positions = ceil_div(square_positions(sample), SPLIT_TILE)
        blocks = ceil_div(self._case.group_out, SPLIT_TILE) * positions
        wanted = SPLIT_BLOCKS // (blocks * self._case.layer.groups)
        splits = max(1, min(wanted, self._depth // SPLIT_DEPTH, MOST_SPLITS))
        depth = ceil_div(self._depth, splits)
        return ceil_div(self._depth, depth), depth

    def _form(self, given: ConvArguments, splits: int, processors: int, *, channels_first: bool) -> Form:
        """The tile that should take least time, and whether a block sums all parts of its sums."""
        fitting = [tile for tile in TILES if self._fits_tile(tile)]
        if self._tile is not None:
            fitting = [tile for tile in fitting if tile.name == self._tile] or fitting
        folding = [tile for tile in fitting if tile.folds] if splits > 1 else []
        fills = any(tile.blocks(given) >= processors for tile in folding)
        if folding and (fills if self._folded is None else self._folded):
            tile = min(folding, key=lambda tile: tile.cost(given, 1, processors))
            return Form(tile, folded=True, channels_first=channels_first)
        tile = min(fitting, key=lambda tile: tile.cost(given, splits, processors))
        return Form(tile, channels_first=channels_first)

    def _fits_tile(self, tile: Tile) -> bool:
        return self._padded_filters % tile.m == 0 and self._case.architecture >= tile.minimum

    def _stage(
        self,
        given: ConvArguments,
        staging: tuple[AxisStaging, ...],
        address: int,
        processors: int,
        holds: tuple[Memory, ...],
    ) -> Launch:
        """Puts what the run reads channels-last."""
        arguments = ConvArguments.from_buffer_copy(given)
        pitch = given.groups * self._group_chunks
        skipped = sum(axis.first * given.axes[i].step for i, axis in enumerate(staging))
        positions = math.prod(axis.count for axis in staging)
        arguments.input = given.input + skipped * self._case.given.itemsize
        arguments.output, arguments.output_sample = address, positions * pitch
        arguments.positions = positions
        for i, axis in enumerate(staging):
            arguments.axes[i].count = axis.count
            arguments.axes[i].step = given.axes[i].step * axis.every
        kernel = stage_kernel(self._case.given, merged=self._merged)
        width = min(8, 1 << (pitch - 1).bit_length())
        x, y = ceil_div(positions * width, kernel.threads), ceil_div(pitch, width)
        turns = max(x * y * given.samples // (processors * STAGE_BLOCKS), 1)
        z = min(ceil_div(given.samples, turns), MOST_ALONG_Y)
        return Launch(kernel, (x, y, z), arguments, holds)


def rounded_tf32(values: NDArray[Any]) -> NDArray[Any]:
    """float32 values rounded to TF32's 11 digits as `cvt.rna.tf32` does: to nearest, ties away from zero."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = np.where(np.isinf(values), bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), rounded).astype(np.uint32).view(np.float32)


def tf32_roundoff(products: int) -> float:
    """c in |z - z*| <= c (sum |x||w| + |bias|): of TF32 operands summed in float32.

    Args:
        products: K, products in a sum.
    """
    operands = 2 * 2.0**-11 + 2.0**-22
    return operands + (products + 3) * FLOAT32.roundoff * (1 + operands)


def _aligned(nbytes: int) -> int:
    return ceil_div(nbytes, ALIGNMENT) * ALIGNMENT


def _checked(scratch: Memory | None, wanted: int) -> Memory | None:
    """The working memory.

    Raises:
        InternalError: it is smaller than what is wanted.
    """
    has = 0 if scratch is None else scratch.nbytes
    if has < wanted:
        raise InternalError(
            f"tensor_core needs {wanted} bytes of working memory, it has {has}", reason=Reason.INTERNAL
        )
    return scratch


def _read_staged(
    arguments: ConvArguments, staging: tuple[AxisStaging, ...], pitch: int, address: int
) -> None:
    """Makes the staged chunks a run's input, `pitch` of them a position."""
    step = pitch
    for i in reversed(range(len(staging))):
        staging[i].apply(arguments.axes[i], step)
        step *= staging[i].count
    arguments.input, arguments.input_sample, arguments.input_channel = address, step, 1
