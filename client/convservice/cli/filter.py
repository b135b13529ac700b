"""`convservice filter`: an image through a filter on a server, and back into a file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from convservice.cli.arguments import add_json, add_service
from convservice.cli.command import Command
from convservice.cli.embedded import connected
from convservice.cli.images import RESPONSES, filter_planes, read_image, write_image
from convservice.cli.kernels import KERNELS, finds_edges, kernel_of
from convservice.cli.outcome import Exit
from convservice.cli.output import byte_size, can_draw_bar, show_json

DESCRIPTION = f"""\
Filters an image on a server. Colour, grey and 16-bit grey images keep their type, each colour channel is
filtered by itself, an alpha channel stays as it is, and the edge pixels are repeated beyond the edge.

Kernels: {", ".join(KERNELS)}, or a matrix in a .npy file (applied as it is, not flipped).
What an image cannot hold depends on --response:
  clip      values below 0 become 0, values above the largest (255) become that
  absolute  the magnitude, then clip: edges are bright on black, whichever way they go
  offset    0 becomes the middle (128), then clip: bright one way, dark the other
The default is absolute for kernels whose weights add up to 0 (sobel, laplacian) and clip for the others.
"""

LARGE_BYTES = 32 << 20
"""Images from this size on are worth a progress bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("image", metavar="IMAGE", type=Path, help="PNG, JPEG, TIFF or what else Pillow reads")
    parser.add_argument("--kernel", metavar="NAME|FILE.npy", required=True, help="the filter")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="the result, in the format of its name",
    )
    parser.add_argument("--response", choices=RESPONSES, help="what becomes of values that do not fit")
    add_service(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Reads the image, has it filtered, writes the result and says what was done."""
    kernel = kernel_of(arguments.kernel)
    response = arguments.response or ("absolute" if finds_edges(kernel) else "clip")
    picture = read_image(arguments.image)
    bar = not arguments.json and picture.colour.nbytes >= LARGE_BYTES and can_draw_bar()
    with connected(arguments) as client:
        started = time.perf_counter()
        result = filter_planes(client, picture, kernel, response, backend=arguments.backend, bar=bar)
        elapsed = time.perf_counter() - started
    write_image(arguments.output, result)
    rows, columns, channels = picture.colour.shape
    if arguments.json:
        show_json(
            {
                "image": str(arguments.image),
                "output": str(arguments.output),
                "kernel": arguments.kernel,
                "response": response,
                "shape": [rows, columns, channels],
                "dtype": picture.colour.dtype.name,
                "alpha": picture.alpha is not None,
                "seconds": elapsed,
            }
        )
    else:
        print(
            f"{arguments.output}: {columns}x{rows}, {channels} channel{'s' if channels > 1 else ''} of"
            f" {picture.colour.dtype}, {arguments.kernel} ({response});"
            f" {byte_size(picture.colour.nbytes)} in {elapsed:.3f} s"
        )
    return Exit.OK


COMMAND = Command("filter", "filter an image", DESCRIPTION, add_arguments, run)
