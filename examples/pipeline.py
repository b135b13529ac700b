"""A step of an image pipeline: every image of a folder through a two-layer network, by `map`.

`map` sends the next images while the first are still being computed, keeps their order, and bounds what is
on its way, so that the folder may hold more than fits into memory. The images may differ in size.

    python examples/pipeline.py localhost:50051 photographs/ --output edges/
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import convservice
from convservice.cli.kernels import KERNELS

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def edges() -> convservice.Network:
    """Grey from red, green and blue with some blur, then how strong the edges are in each direction."""
    blur = np.multiply.outer(LUMINANCE, KERNELS["gaussian"])[None]
    sobel = np.stack([sign * KERNELS[name] for name in ("sobel-x", "sobel-y") for sign in (1, -1)])[:, None]
    return convservice.Network(
        [
            convservice.Conv(blur, padding="same", padding_mode="replicate"),
            convservice.Conv(sobel, padding="same", padding_mode="replicate", activation="relu"),
        ]
    )


def images(paths: list[Path]) -> Iterator[NDArray[np.uint8]]:
    """Each image as (rows, columns, 3), read when it is its turn."""
    for path in paths:
        with Image.open(path) as image:
            yield np.asarray(image.convert("RGB"))


def drawn(feature_maps: NDArray[np.float32]) -> Image.Image:
    """How strong the strongest edge is at each place, white on black."""
    return Image.fromarray(np.minimum(feature_maps.max(axis=-1), 255).astype(np.uint8))


def main() -> None:
    """Prints for every image which direction its edges mostly have, and draws them if told where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="HOST:PORT of a server")
    parser.add_argument("folder", type=Path, help="with .jpg or .png images")
    parser.add_argument("--output", type=Path, help="a folder for an image of the edges of each")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() in {".jpg", ".png"})

    with convservice.connect(arguments.target) as client:
        network = client.register(edges())  # the weights travel once
        results = client.map(network, images(paths), data_format="channels_last")
        for path, feature_maps in zip(paths, results, strict=True):
            right, left, down, up = feature_maps.mean(axis=(0, 1))
            mostly = "vertical" if right + left > down + up else "horizontal"
            print(f"{path.name}: {feature_maps.shape}, edges mostly {mostly}", flush=True)
            if arguments.output is not None:
                drawn(feature_maps).save(arguments.output / f"{path.stem}.png")


if __name__ == "__main__":
    main()
