"""How much one launch is given, and the grid that it is given to.

A run is launched in pieces: a cancel is seen between launches, and kernels count positions with 32 bits.
"""

from __future__ import annotations

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_SIZE
from convservice_backends.cuda.algorithms.base import ceil_div

MOST_WORK = 200_000_000_000
"""Multiply-adds of one launch at most: a cancel is seen between launches. By datasheets a few milliseconds of
a large GPU; not measured."""

MOST_ALONG_Y = 65_535
"""Blocks that a grid may have along y and along z."""


def rows_at_once(
    row_work: int, row_positions: int, rows: int, *, quantum: int = 1, most_positions: int = MAX_SIZE
) -> int:
    """Output rows of one launch: a multiple of the quantum, unless it is all of them.

    Args:
        row_work: multiply-adds of a row over all samples.
        row_positions: outputs of a row of one filter.
        rows: rows wanted.
        quantum: a launch begins at a multiple of so many.
        most_positions: outputs of one filter that a launch may have.
    """
    most = min(MOST_WORK // max(1, row_work), most_positions // row_positions) // quantum * quantum
    return max(1, min(rows, max(quantum, most)))


def check_positions(positions: int, most: int = MAX_SIZE, what: str = "a row of a feature map") -> None:
    """Refuses what kernels cannot count.

    Raises:
        InvalidRequest: `SIZE_OVERFLOW`, with the numbers.
    """
    if positions > most:
        raise InvalidRequest(
            f"{what} has at most {most} positions on a device, not {positions}",
            reason=Reason.SIZE_OVERFLOW,
            metadata={"positions": str(positions), "maximum": str(most)},
        )


def plane_grid(items: int, planes: int, threads: int) -> tuple[int, int, int]:
    """The grid of a kernel that deals its threads out to planes; see kernels/planes.cuh.

    Args:
        items: threads that a plane wants.
        planes: their number.
        threads: of a block.
    """
    lanes = min(threads, 1 << (items - 1).bit_length())
    return ceil_div(items, lanes), min(ceil_div(planes, threads // lanes), MOST_ALONG_Y), 1
