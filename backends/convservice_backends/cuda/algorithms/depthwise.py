"""depthwise: groups that see few channels, where memory is the limit; see kernels/depthwise.cu.

A thread computes a small tile of outputs and adds products in the order of `direct`, so that the two give the
same bits, and so do all forms of the kernel: the form follows the layer, what is read in quads follows
alignment.

Which layers, by counting instructions and loads (nothing here has been measured). A tiled matrix product
computes 32 filters of a group at the least: with fewer, what is left of the 60 to 80 % of the arithmetic
peak that such products reach elsewhere is at most that times group_out / 32. The forms of one size and
stride add 144 products to 18 loads for each channel (3x3, stride 1), 576 to 27 with four filters a
thread: half of the peak would be left at any number of filters, without loss to padding. So they should
be better up to 16 filters a group, and with four filters a thread also for more of them where a sum has
so few products (36) that a matrix product is mostly prologue. The general form adds 4 products to 2
loads, one of which takes 4 turns of the cache: a fifth of the peak, good for up to 8 filters. Rows of 16
bits leave groups of more than 8 filters to tensor cores, whose tiles are 8 wide. Sums of many products
(more than 288, but for one channel) are left to algorithms that can split them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.geometry import SampleShape
from convservice_backends.cuda.algorithms.base import Case, Problem, ceil_div, filters_as, float_types
from convservice_backends.cuda.device import Launch
from convservice_backends.cuda.source import Kernel, type_constants, type_label

THREADS = 128
MOST_ALONG_Y = 65_535
"""Blocks that a grid may have along y."""

FARTHEST = 1 << 30
"""Elements of a channel's rows under one output row, and steps, stay below it: offsets have 32 bits."""


class Tile(NamedTuple):
    """What a thread computes, and with how many registers.

    Attributes:
        rows: output rows.
        columns: output columns, a multiple of 4.
        blocks: of one multiprocessor that registers must suffice for: as many as need no spills anywhere.
    """

    rows: int
    columns: int
    blocks: int


@dataclass(frozen=True)
class Form:
    """One form of the kernel: a size and stride along both axes, and the tile of a thread.

    Attributes:
        size: weights along each axis; 0 for the general form.
        stride: along each axis.
        filters: filters that a thread computes.
        tile: of rows of float32.
        wide_tile: of rows of float64, whose sums take two registers each.
        short_tile: of rows of 16 bits, which must be computed twice as fast to be read and written as fast.
    """

    size: int
    stride: int
    filters: int
    tile: Tile
    wide_tile: Tile
    short_tile: Tile

    @property
    def label(self) -> str:
        """As it stands in a kernel's name."""
        if not self.size:
            return "general"
        filters = f"_filters{self.filters}" if self.filters > 1 else ""
        return f"{self.size}x{self.size}_stride{self.stride}{filters}"

    def tile_for(self, given: DType) -> Tile:
        """The tile for rows of this type."""
        return {8: self.wide_tile, 4: self.tile, 2: self.short_tile}[given.itemsize]

    def fits(self, case: Case) -> bool:
        """Whether a layer is of this form."""
        if not self.size:
            return True
        layer = case.layer
        square = layer.kernel == (self.size,) * 2 and layer.stride == (self.stride,) * 2
        return square and layer.dilation == (1, 1) and case.group_out % self.filters == 0


FORMS = (
    Form(3, 1, 4, Tile(2, 4, 3), Tile(1, 4, 3), Tile(2, 4, 3)),
    Form(3, 2, 4, Tile(2, 4, 2), Tile(1, 4, 2), Tile(2, 4, 2)),
    Form(3, 1, 1, Tile(4, 4, 4), Tile(2, 4, 4), Tile(4, 8, 3)),
    Form(3, 2, 1, Tile(2, 4, 3), Tile(2, 4, 3), Tile(2, 8, 2)),
    Form(5, 1, 1, Tile(4, 4, 3), Tile(2, 4, 3), Tile(4, 4, 3)),
    Form(5, 2, 1, Tile(2, 4, 3), Tile(1, 4, 3), Tile(2, 4, 3)),
    Form(7, 1, 1, Tile(4, 4, 2), Tile(2, 4, 2), Tile(4, 4, 2)),
    Form(0, 1, 1, Tile(1, 4, 6), Tile(1, 4, 6), Tile(1, 4, 6)),
)
"""In the order in which they are tried."""


def form_of(case: Case) -> Form:
    """The form that computes a layer."""
    return next(form for form in FORMS if form.fits(case))


class Depthwise:
    """A tile of neighbouring outputs a thread, in the order channel, then weight."""

    name: ClassVar[str] = "depthwise"
    packing = ()
    quantum = 1

    def __init__(self, case: Case) -> None:
        self._case = case
        self._form = form_of(case)

    @classmethod
    def fits(cls, case: Case) -> bool:
        """Groups of few channels, by the counts in this module's docstring; rows within 32-bit offsets."""
        layer = case.layer
        width = case.row_elements // layer.in_channels
        far = max(
            2 * width * (case.rows_under_one + layer.stride[0]),
            *(4 * step for step in (*layer.stride, *layer.dilation)),
        )
        products = case.group_in * int(np.prod(layer.kernel))
        if far >= FARTHEST or (products > 288 and case.group_in > 1):
            return False
        form = form_of(case)
        most = 16 if form.size and case.given.itemsize > 2 else 8
        few_products = form.filters > 1 and products <= 36 and case.given.itemsize > 2
        return case.group_out <= most or few_products

    @classmethod
    def kernels(cls) -> Iterator[Kernel]:
        """Every form for each pair of types."""
        for given, out in float_types():
            for form in FORMS:
                yield _kernel(form, given, out)

    def pack(self) -> NDArray[Any]:
        """(groups, group_out / filters, group_in, taps, filters) in the type of the sums."""
        packed = filters_as(self._case.layer, self._case.sums)
        groups, group_out, group_in, taps = packed.shape
        filters = self._form.filters
        parts = packed.reshape(groups, group_out // filters, filters, group_in, taps)
        return np.ascontiguousarray(parts.transpose(0, 1, 3, 4, 2))

    def scratch_bytes(self, sample: SampleShape, rows: int, samples: int) -> int:
        """None."""
        return 0

    def launches(self, problem: Problem) -> Iterator[Launch]:
        """Tiles along x, planes along y; grids cut off at what hardware takes, the kernel goes round."""
        arguments, form = problem.arguments, self._form
        outer, rows, columns = (axis.count for axis in arguments.axes)
        tile = form.tile_for(self._case.given)
        tiles = outer * ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
        lanes = min(THREADS, 1 << (tiles - 1).bit_length())
        planes = arguments.samples * (arguments.groups * arguments.group_out // form.filters)
        grid = (ceil_div(tiles, lanes), min(ceil_div(planes, THREADS // lanes), MOST_ALONG_Y), 1)
        yield Launch(_kernel(form, self._case.given, problem.out), grid, arguments, problem.holds)


def _kernel(form: Form, given: DType, out: DType) -> Kernel:
    tile = form.tile_for(given)
    constants = (
        *type_constants(given, out),
        ("SIZE", form.size),
        ("STRIDE", form.stride),
        ("FILTERS", form.filters),
        ("ROWS", tile.rows),
        ("COLUMNS", tile.columns),
        ("BLOCKS", tile.blocks),
    )
    return Kernel("depthwise", f"{type_label(given, out)}_{form.label}", THREADS, constants)
