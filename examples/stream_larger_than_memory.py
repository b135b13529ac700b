"""An image of 16 GiB, or of any height, through a filter: no machine ever holds more than a few of its rows.

The rows are made as they are sent; in earnest they would come from a line-scan camera or a file. The server
hands back each row of the result as soon as the rows under it have come.

    python examples/stream_larger_than_memory.py localhost:50051
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

import convservice

CHANNELS, WIDTH = 4, 16_384
EDGES = np.array([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]], np.float32)


def scan_lines(height: int) -> Iterator[NDArray[np.float32]]:
    """Rows of the image from top to bottom, sixteen at a time: (channels, rows, columns)."""
    columns = np.linspace(0, 40, WIDTH, dtype=np.float32)
    for first in range(0, height, 16):
        rows = np.arange(first, min(first + 16, height), dtype=np.float32)[:, None]
        yield np.stack([np.sin(columns + rows / (50 + channel)) for channel in range(CHANNELS)])


def main() -> None:
    """Streams the image and keeps one number per row of the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="HOST:PORT of a server")
    parser.add_argument("--height", type=int, default=65_536, help="rows (default: 65536, which is 16 GiB)")
    arguments = parser.parse_args()

    weight = np.broadcast_to(EDGES, (CHANNELS, 1, 3, 3))  # one filter for each channel
    layer = convservice.Conv(weight, padding=1, groups=CHANNELS)
    strongest = 0.0
    with convservice.connect(arguments.target) as client:
        # The height need not be known: (CHANNELS, None, WIDTH) ends when the scan lines do.
        shape = (CHANNELS, arguments.height, WIDTH)
        for band in client.stream(layer, scan_lines(arguments.height), shape=shape, dtype="float32"):
            strongest = max(strongest, float(np.abs(band.array).max()))
            done = band.first_row + band.array.shape[1]
            print(f"\rrow {done:,} of {arguments.height:,}", end="", flush=True)
    print(f"\nthe strongest edge is {strongest:.4f}")


if __name__ == "__main__":
    main()
