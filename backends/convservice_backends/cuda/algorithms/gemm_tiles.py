"""The compiled forms of implicit_gemm: tiles and gathers, and the choice of a tile for a launch.

Given how many filters and columns a product has and how many multiprocessors there are, `choose_tile` hands
on the tile that keeps them busiest. No choice here changes a bit: every tile sums the same terms in the same
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from convservice.dtypes import FLOAT32, FLOAT64, DType
from convservice_backends.cuda.algorithms.base import ceil_div, float_types
from convservice_backends.cuda.source import Kernel, type_constants, type_label

DEPTH = 8
"""Terms of a sum between two barriers; the packed terms are a multiple of it."""

SHORT_TERMS = 512
"""Terms that fit the list of the `SHORT` gather."""


class Gather(IntEnum):
    """How a kernel reads its inputs: the numbers and names of gather.cuh, which describes them."""

    VECTORS = 1
    TAPS = 2
    SHORT = 3
    TABLE = 4


@dataclass(frozen=True)
class Tile:
    """What one block computes.

    Attributes:
        filters: filters of a tile.
        columns: output positions of a tile.
        own_filters: filters of one thread.
        own_columns: positions of one thread.
        blocks: blocks of a multiprocessor at a time, which bounds a thread's registers.
        speed: how fast its products are where all multiprocessors are busy; the fastest has 1. An estimate
            from the compiled loops: multiply-adds among all instructions, and shared memory read for each.
    """

    filters: int
    columns: int
    own_filters: int
    own_columns: int
    blocks: int
    speed: float

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.filters * self.columns // (self.own_filters * self.own_columns)

    @property
    def label(self) -> str:
        """As kernels' names have it."""
        return f"{self.filters}x{self.columns}"


LARGE = Tile(128, 128, 8, 8, 2, 1.0)
MEDIUM = Tile(64, 64, 8, 4, 4, 0.8)
WIDE = Tile(32, 128, 8, 4, 4, 0.75)
SMALL = Tile(32, 32, 4, 4, 8, 0.5)
MEDIUM_FLOAT64 = Tile(64, 64, 4, 4, 2, 1.0)

FILTER_PADS = (32, 64, 128)
"""Packed filters are a multiple of the first of these that they fit, else of the last."""


def tiles_of(given: DType, gather: Gather) -> tuple[Tile, ...]:
    """The tiles that a gather is compiled with, the largest first."""
    if given == FLOAT64:
        return (MEDIUM_FLOAT64,)
    if given != FLOAT32:
        return (MEDIUM,)
    if gather in (Gather.SHORT, Gather.TABLE):
        return (MEDIUM, WIDE, SMALL)
    return (LARGE, MEDIUM, WIDE, SMALL)


def gathers_of(given: DType) -> tuple[Gather, ...]:
    """The gathers that there are for rows of a float dtype."""
    return tuple(Gather) if given in (FLOAT32, FLOAT64) else (Gather.TABLE,)


def packed_filters(given: DType, filters: int) -> int:
    """How many filters of one group are packed, zeros included: whole tiles of any tile that fits them."""
    least = min(tile.filters for gather in gathers_of(given) for tile in tiles_of(given, gather))
    pad = next((pad for pad in FILTER_PADS if pad >= max(least, filters)), FILTER_PADS[-1])
    return ceil_div(filters, pad) * pad


@dataclass(frozen=True)
class Product:
    """The size of one launch.

    Attributes:
        filters: filters of a group.
        columns: output positions over all samples.
        parts: products of that size: groups times splits.
    """

    filters: int
    columns: int
    parts: int

    def blocks(self, tile: Tile) -> int:
        """Tiles of the launch."""
        return ceil_div(self.filters, tile.filters) * ceil_div(self.columns, tile.columns) * self.parts


def choose_tile(tiles: Iterable[Tile], product: Product, processors: int) -> Tile:
    """The tile with which a product is done first.

    A multiprocessor takes as long as its share of the blocks, each as long as a whole tile is at that tile's
    speed, however empty it be.

    Args:
        tiles: to choose from, the largest first, which is taken among equals.
        product: what there is to do.
        processors: the device's multiprocessors.
    """

    def time(tile: Tile) -> float:
        return ceil_div(product.blocks(tile), processors) * tile.filters * tile.columns / tile.speed

    return min(tiles, key=time)


def product_kernel(given: DType, out: DType, gather: Gather, tile: Tile) -> Kernel:
    """One compiled form of implicit_gemm.cu."""
    constants = (
        *type_constants(given, out),
        ("GATHER", int(gather)),
        ("TILE_M", tile.filters),
        ("TILE_N", tile.columns),
        ("THREAD_M", tile.own_filters),
        ("THREAD_N", tile.own_columns),
        ("BLOCKS", tile.blocks),
    )
    label = f"{type_label(given, out)}_{gather.name.lower()}_{tile.label}"
    return Kernel("implicit_gemm", label, tile.threads, constants)


def reduce_kernel(given: DType, out: DType) -> Kernel:
    """The second pass of split sums."""
    return Kernel("reduce", type_label(given, out), 256, type_constants(given, out))


def every_kernel() -> Iterator[Kernel]:
    """All forms that may be compiled."""
    for given, out in float_types():
        for gather in gathers_of(given):
            for tile in tiles_of(given, gather):
                yield product_kernel(given, out, gather, tile)
        yield reduce_kernel(given, out)
