"""The compiled forms of `tensor_core`, its tiles, and the kernels that run before and after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from convservice.dtypes import FLOAT32, DType, dtype_of
from convservice_backends.cuda.algorithms.base import ceil_div
from convservice_backends.cuda.arguments import ConvArguments
from convservice_backends.cuda.source import Kernel, type_constants, type_label

CHUNK_BYTES = 16
"""What is copied at once: neighbouring channels of one position."""

ROW_CHUNKS = 4
"""Chunks of a filter, and of a position, in one tile of terms."""

FILTERS_TOGETHER = 32
"""Filters whose chunks of one tile of terms lie together."""

THREADS, STAGES = 128, 4

MINIMUM = {dtype_of("float16"): 75, dtype_of("bfloat16"): 80, FLOAT32: 80}
"""The lowest architecture whose tensor cores multiply a type."""


@dataclass(frozen=True)
class Tile:
    """What a block computes at once.

    Attributes:
        m: filters.
        n: positions.
        warps_m: warps along the filters; four in all.
        resident: blocks that a multiprocessor should hold at once, which bounds a thread's registers.
        speed: multiply-adds per cycle of a full multiprocessor, relative to the largest tile's (an estimate).
        folds: whether there is a form whose blocks sum all parts of split sums.
        minimum: the lowest architecture with enough shared memory.
    """

    m: int
    n: int
    warps_m: int
    resident: int
    speed: float
    folds: bool
    minimum: int = 75

    @property
    def name(self) -> str:
        """Its size, such as "128x64": filters, then positions."""
        return f"{self.m}x{self.n}"

    def blocks(self, given: ConvArguments) -> int:
        """Blocks that compute all filters at all positions of all samples."""
        columns: int = ceil_div(given.samples * given.positions, self.n)
        filters: int = ceil_div(given.group_out, self.m) * given.groups
        return filters * columns

    def cost(self, given: ConvArguments, splits: int, processors: int) -> float:
        """Relative time: what the multiprocessor with most blocks has to multiply."""
        return ceil_div(self.blocks(given) * splits, processors) * self.m * self.n / self.speed


TILES = (
    Tile(128, 128, warps_m=2, resident=2, speed=1.0, folds=False, minimum=80),
    Tile(64, 128, warps_m=2, resident=2, speed=0.85, folds=True),
    Tile(64, 64, warps_m=2, resident=4, speed=0.65, folds=True),
    Tile(32, 128, warps_m=1, resident=4, speed=0.6, folds=False),
)


@dataclass(frozen=True)
class Form:
    """How blocks compute.

    Attributes:
        tile: what a block computes at once.
        folded: whether one block sums all parts of a split sum.
        channels_first: whether it reads rows as they are, and not staged ones.
    """

    tile: Tile
    folded: bool = False
    channels_first: bool = False

    def kernel(self, given: DType, out: DType) -> Kernel:
        """The kernel for rows of these types."""
        tile = self.tile
        constants = (
            *type_constants(given, out),
            ("TILE_M", tile.m),
            ("TILE_N", tile.n),
            ("WARPS_M", tile.warps_m),
            ("WARPS_N", THREADS // 32 // tile.warps_m),
            ("STAGES", STAGES),
            ("BLOCKS", tile.resident),
            ("FOLD", int(self.folded)),
            ("CHANNELS_FIRST", int(self.channels_first)),
        )
        label = (
            f"{type_label(given, out)}_{tile.name}" + "_rows" * self.channels_first + "_fold" * self.folded
        )
        shared = STAGES * (tile.m + tile.n) * ROW_CHUNKS * CHUNK_BYTES
        minimum = max(MINIMUM[given], tile.minimum)
        return Kernel("tensor_core", label, THREADS, constants, dynamic_bytes=shared, minimum=minimum)


def forms(given: DType) -> Iterator[Form]:
    """All forms for rows of a type."""
    for tile in TILES:
        for folded in (False, True) if tile.folds else (False,):
            yield Form(tile, folded)
            if given.itemsize == 2:
                yield Form(tile, folded, channels_first=True)


def stage_kernel(given: DType, *, merged: bool) -> Kernel:
    """Puts rows channels-last, or the channels of whole windows along the innermost axis."""
    constants = (*type_constants(given, given), ("MERGED", int(merged)))
    return Kernel("stage", given.name + "_merged" * merged, 256, constants, minimum=MINIMUM[given])
