"""fourier: large filters by the discrete Fourier transform, in float64, tile by tile.

Overlap-save: the map is cut into tiles at absolute multiples of the outputs that a tile gives, on both axes;
a tile's inputs are transformed, multiplied by the filters' transforms and transformed back. The kernels are
those of kernels/fourier.cu; the device transforms between them. float32 and 16-bit rows alone: errors in
float64 stay far below what the promise allows, and what the bound of a tile does not cover is summed from its
own products (see `error_factors`).

What fixes the bits: the tile's size, from the layer, the types and the width; the number of tiles transformed
at once, from one sample's width: batches are filled up, since cuFFT may choose other kernels for another
number. That one plan of cuFFT gives an array the same bits at every place of a batch is taken for granted; it
has not been seen on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType
from convservice.geometry import MAX_SIZE, SampleShape
from convservice_backends.cuda.algorithms.base import Case, Problem, ceil_div, filters_as, float_types
from convservice_backends.cuda.algorithms.fourier_tiles import (
    SQUARE_SIZES,
    Tile,
    cheapest_tile,
    kernel_of,
    tiles_for,
)
from convservice_backends.cuda.arguments import ConvArguments
from convservice_backends.cuda.device import Launch, Transform
from convservice_backends.cuda.source import Kernel, type_constants, type_label

Floats = NDArray[np.float64]

THREADS = 256

GIVEN = tuple(dtype for dtype in DTYPES if dtype.is_float and dtype.accumulator == FLOAT32)
"""Rows whose sums in float64 are far better than in their own accumulator."""

OWN_FILTERS, OWN_TILES = 4, 2
"""Of one thread that multiplies; those of fourier.cu."""

BATCH_BYTES = 256 << 20
"""Working memory at most, unless one tile alone takes more."""

PREFERRED_BYTES = 64 << 20
"""Working memory worth a launch: what goes through device memory then takes longer than asking for it, by the
bandwidth of datasheets."""

FEWEST_TILES = 4
"""Tiles transformed at once at least, if they fit: a filter's transform is read once for `OWN_TILES`."""

LINE_TILES = 16
"""Tiles of one row that are transformed at once at most: the length may not be known beforehand."""

MOST_ALONG_Y = 65_535
"""Blocks that a grid may have along y."""


def error_factors(filters: Floats, elements: int) -> Floats:
    """How far a transformed sum may be from the exact one, divided by the 2-norm of the tile's inputs.

    By Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., theorem 24.2, a transform of n =
    2**t numbers has an error of at most t eta / (1 - t eta) times the 2-norm of the result, where eta = mu +
    gamma_4 (sqrt 2 + mu) and mu is the error of the roots of unity: below 8 u for mu up to 2 u. Two stages
    more pay for what real transforms do before or after: e = 8 u (t + 2). Then, X and W the transforms of x
    and w, the sums over channels c:

    - the products err by (2 e + (C + 3) u) sum |X_c| |W_c| at each frequency (C additions, and the rounding
      of a complex product, lemma 3.5), which the inverse, 1/n times a sum over n frequencies, takes to no
      more than (2 e + (C + 3) u) sum ||x_c|| ||w_c||, by Cauchy, Schwarz and Parseval;
    - the inverse itself errs by e times the 2-norm of all its results, which by Young's inequality is at
      most sum ||x_c|| ||w_c||_1.

    By Cauchy and Schwarz again sum ||x_c|| ||w_c|| <= ||x|| ||w||, over all channels. One percent is for
    terms of higher order. Nothing overflows or underflows: squares of float32 are inside float64's range.

    Args:
        filters: (filters, channels of a group, taps).
        elements: n, inputs of a tile in one channel, a power of two.

    Returns:
        (filters,).
    """
    channels = filters.shape[1]
    stages = math.log2(elements) + 2
    euclidean = np.sqrt((filters**2).sum(axis=(1, 2)))
    absolute = np.sqrt((np.abs(filters).sum(axis=2) ** 2).sum(axis=1))
    products = (16 * stages + channels + 3) * euclidean
    return np.asarray(1.01 * FLOAT64.roundoff * (products + 8 * stages * absolute))


class Fourier:
    """Tiles of inputs, transformed, multiplied, transformed back.

    Args:
        case: the layer in its place.
        tile: one to take, at least as large as the filter on both axes; the cheapest where not given.
    """

    name: ClassVar[str] = "fourier"

    def __init__(self, case: Case, tile: Tile | None = None) -> None:
        self._case = case
        self._kernel = kernel_of(case)
        self.tile = tile or cheapest_tile(case)
        self._down, self._across = self.tile.outputs(self._kernel)

    @classmethod
    def fits(cls, case: Case) -> bool:
        """1-D and 2-D, stride and dilation 1, finite filters whose transforms are not too large."""
        layer = case.layer
        if layer.rank > 2 or case.given not in GIVEN:
            return False
        if {*layer.stride, *layer.dilation} != {1} or layer.out_channels > MOST_ALONG_Y:
            return False
        if case.row_positions * SQUARE_SIZES[-1] > MAX_SIZE:  # of one row of tiles
            return False
        if not any(True for _ in tiles_for(case)):
            return False
        return bool(np.isfinite(layer.weight.astype(np.float32)).all())

    @classmethod
    def kernels(cls) -> Iterator[Kernel]:
        """What surveys and multiplies; what gathers, for each type; what finishes, for each pair of types."""
        yield _survey_kernel()
        yield _multiply_kernel()
        for given in GIVEN:
            yield _gather_kernel(given)
        for given, out in float_types():
            if given in GIVEN:
                yield _finish_kernel(given, out)

    @property
    def packing(self) -> tuple[int, int]:
        """The tile, which follows from the width of the rows."""
        return (self.tile.rows, self.tile.columns)

    @property
    def quantum(self) -> int:
        """The outputs of a tile along the first axis."""
        return self._across if self._case.layer.rank == 1 else self._down

    def pack(self) -> Floats:
        """What fourier.cu reads, flat: transforms, error factors, which filters are of integers, filters."""
        layer, tile = self._case.layer, self.tile
        filters = filters_as(layer, FLOAT64).reshape(layer.out_channels, self._case.group_in, -1)
        arrays = filters.reshape(*filters.shape[:2], *self._kernel)
        spectra = np.fft.rfft2(arrays, s=(tile.rows, tile.columns), axes=(2, 3))
        integers = (filters == np.rint(filters)).all(axis=(1, 2)).astype(np.float64)
        parts = (
            np.ascontiguousarray(spectra, dtype=np.complex128).reshape(-1).view(np.float64),
            error_factors(filters, tile.elements),
            integers,
            filters.reshape(-1),
        )
        return np.concatenate(parts)

    def batch(self, sample: SampleShape) -> int:
        """Tiles that are transformed at once, always so many: those of one row of tiles, and of further rows
        up to `PREFERRED_BYTES`, of a map that is taken to be as high as it is wide."""
        wanted = LINE_TILES
        if sample.rest:
            across, down = ceil_div(sample.rest[0], self._across), ceil_div(sample.rest[0], self._down)
            rows = max(1, min(down, PREFERRED_BYTES // (across * self._tile_bytes)))
            wanted = max(FEWEST_TILES, rows * across)
        return max(1, min(wanted, BATCH_BYTES // self._tile_bytes))

    def scratch_bytes(self, sample: SampleShape, rows: int, samples: int) -> int:
        """For one batch of tiles: what is known of them, inputs or sums, both transforms; for any run."""
        return self._parts(self.batch(sample))[-1]

    def library_bytes(self, sample: SampleShape) -> int:
        """What cuFFT may take beside that for its two plans, assumed to be what each reads and writes."""
        reals, spectra, _, end = self._parts(self.batch(sample))
        return (spectra - reals) + (end - reals)

    def launches(self, problem: Problem) -> Iterator[Launch | Transform]:
        """Batch by batch: gather, survey, transform, multiply, transform back, finish."""
        scratch = problem.scratch
        if scratch is None:
            raise ValueError("transforms need working memory")
        case, tile, batch = self._case, self.tile, self.batch(problem.sample)
        channels, filters = case.layer.in_channels, case.layer.out_channels
        reals, spectra, products, _ = self._parts(batch)
        a = ConvArguments.from_buffer_copy(problem.arguments)
        a.scratch, a.splits = scratch.address, batch
        a.axes[1].unused, a.axes[2].unused = tile.rows, tile.columns
        holds = (*problem.holds, scratch)
        sizes = (tile.rows, tile.columns)
        chunks, of_frequencies = ceil_div(tile.elements, THREADS), ceil_div(tile.frequencies, THREADS)
        parts = case.layer.groups * ceil_div(case.group_out, OWN_FILTERS)
        outputs = ceil_div(self._down * self._across, THREADS)
        down, across = ceil_div(a.axes[1].count, self._down), ceil_div(a.axes[2].count, self._across)
        for first in range(0, a.samples * down * across, batch):
            a = ConvArguments.from_buffer_copy(a)
            a.split_depth = first
            yield Launch(_gather_kernel(case.given), (chunks, batch, 1), a, holds)
            yield Launch(_survey_kernel(), (ceil_div(32 * tile.rows, THREADS), batch, 1), a, holds)
            yield Transform(scratch, reals, spectra, batch * channels, *sizes, inverse=False)
            yield Launch(_multiply_kernel(), (of_frequencies, parts, ceil_div(batch, OWN_TILES)), a, holds)
            yield Transform(scratch, products, reals, batch * filters, *sizes, inverse=True)
            yield Launch(_finish_kernel(case.given, problem.out), (outputs, filters, batch), a, holds)

    @cached_property
    def _tile_bytes(self) -> int:
        """Working memory of one tile, what is known of it aside."""
        layer, tile = self._case.layer, self.tile
        maps = layer.in_channels + layer.out_channels
        return 8 * max(layer.in_channels, layer.out_channels) * tile.elements + 16 * maps * tile.frequencies

    def _parts(self, batch: int) -> tuple[int, int, int, int]:
        """Where inputs, their transforms and those of the sums begin in the working memory, and its size."""
        layer, tile = self._case.layer, self.tile
        statistics, places = 16 * batch * ceil_div(tile.elements, THREADS), 3 * batch * tile.elements
        reals = (ceil_div(statistics, 256) + ceil_div(places, 256)) * 256
        spectra = reals + 8 * batch * max(layer.in_channels, layer.out_channels) * tile.elements
        products = spectra + 16 * batch * layer.in_channels * tile.frequencies
        return (reals, spectra, products, reals + batch * self._tile_bytes)


def _gather_kernel(given: DType) -> Kernel:
    constants = (*type_constants(given, given), ("GATHER", 1))
    return Kernel("fourier", f"gather_{given.name}", THREADS, constants)


def _survey_kernel() -> Kernel:
    constants = (*type_constants(FLOAT32, FLOAT32), ("SURVEY", 1))
    return Kernel("fourier", "survey", THREADS, constants)


def _multiply_kernel() -> Kernel:
    constants = (*type_constants(FLOAT32, FLOAT32), ("MULTIPLY", 1))
    return Kernel("fourier", "multiply", THREADS, constants)


def _finish_kernel(given: DType, out: DType) -> Kernel:
    constants = (*type_constants(given, out), ("FINISH", 1))
    return Kernel("fourier", f"finish_{type_label(given, out)}", THREADS, constants)
