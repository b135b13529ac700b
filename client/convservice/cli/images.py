"""Images in files to arrays and back, and an image's way through a filter.

Given a file, `read_image` hands on colour and alpha apart, as unsigned integers with the axes (rows,
columns, channels); `filter_planes` has a server filter each colour channel; `write_image` joins what it
kept and writes it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convservice.cli.kernels import Kernel
from convservice.cli.outcome import CommandFailed, Exit, missing_extra

if TYPE_CHECKING:
    from PIL import Image

    from convservice import ConvClient

RESPONSES = ("clip", "absolute", "offset")
"""What becomes of values that an image cannot hold; see `filter_planes`."""


@dataclass(frozen=True)
class Picture:
    """An image.

    Attributes:
        colour: (rows, columns, channels), uint8 or uint16; 1 channel is grey, 3 are red, green, blue.
        alpha: (rows, columns, 1), of the same type; None where the image has none.
    """

    colour: NDArray[Any]
    alpha: NDArray[Any] | None


def read_image(path: Path) -> Picture:
    """Reads an image, turned upright where its camera said how it was held.

    Palettes become colours, 1-bit images become grey; 16-bit grey stays as it is. An image may be as large
    as memory is.

    Raises:
        CommandFailed: Pillow is missing, the file is no image that it can read, or there is no memory for it.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as exc:
        raise missing_extra("pillow", "cli") from exc
    try:
        with _any_size(), Image.open(path) as opened:
            pixels = _pixels(opened)
    except UnidentifiedImageError as exc:
        raise CommandFailed(f"{path} is no image of a format that can be read here", Exit.USAGE) from exc
    except OSError as exc:
        raise CommandFailed(f"cannot read {path}: {exc.strerror or exc}", Exit.USAGE) from exc
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    colours = pixels.shape[2] - (pixels.shape[2] in (2, 4))
    return Picture(pixels[:, :, :colours], pixels[:, :, colours:] if colours < pixels.shape[2] else None)


@contextmanager
def _any_size() -> Generator[None]:
    """Lifts Pillow's limit on pixels: it guards against images of strangers, and these are the user's own."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _pixels(opened: Image.Image) -> NDArray[Any]:
    """An opened image upright, as (rows, columns) or (rows, columns, channels)."""
    from PIL import ImageOps

    columns, rows = opened.size
    try:
        image = ImageOps.exif_transpose(opened)
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            image = image.convert(_plain_mode(image.mode, image.has_transparency_data))
        return np.asarray(image)
    except MemoryError as exc:
        raise CommandFailed(f"there is no memory here for an image of {columns}x{rows} pixels") from exc


def _plain_mode(mode: str, transparent: bool) -> str:
    """The mode that an image of another one is converted to."""
    if mode.startswith("I;16"):
        return "I;16"
    if mode in ("I", "F"):
        raise CommandFailed(
            f"an image of mode {mode} has 32 bits per pixel; 8-bit images and 16-bit grey ones are taken",
            Exit.USAGE,
        )
    if mode == "1":
        return "L"
    return "RGBA" if transparent else "RGB"


def write_image(path: Path, picture: Picture) -> None:
    """Writes an image in the format that the file's name says.

    Raises:
        CommandFailed: no such format, the format cannot hold the image, or the file cannot be written.
    """
    from PIL import Image

    parts = [picture.colour] if picture.alpha is None else [picture.colour, picture.alpha]
    pixels = np.ascontiguousarray(np.concatenate(parts, axis=2))
    try:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path)
    except ValueError as exc:
        raise CommandFailed(f"cannot write {path}: its name says no known image format", Exit.USAGE) from exc
    except OSError as exc:
        raise CommandFailed(f"cannot write {path}: {exc.strerror or exc}", Exit.USAGE) from exc


def filter_planes(
    client: ConvClient,
    picture: Picture,
    kernel: Kernel,
    response: str,
    *,
    backend: str | None = None,
    bar: bool = False,
) -> Picture:
    """The picture with every colour channel filtered by the server; the alpha channel as it was.

    Integers travel both ways: the server sums in float32, rounds half to even and saturates to the image's
    type. Every channel is a group of its own, the edge pixels are repeated beyond the edge, and the result
    has the picture's size.

    Args:
        client: a connected client.
        picture: the image.
        kernel: (kh, kw), applied as it is, not flipped.
        response: `clip` keeps 0 to the type's largest value; `absolute` is the magnitude of what the kernel
            gives; `offset` puts 0 at the middle of the range, so that both signs can be seen.
        backend: a backend's name; None for the server's choice.
        bar: whether to show the transfer's progress.
    """
    channels = picture.colour.shape[2]
    # Saturation turns what is below 0 into 0. So a second filter with the opposite weights finds what the
    # first one loses, and of the two one is 0: together they are the magnitude.
    signs = [1, -1] if response == "absolute" else [1]
    weight = np.stack([sign * kernel for _ in range(channels) for sign in signs])[:, None].astype(np.float32)
    middle = (np.iinfo(picture.colour.dtype).max + 1) // 2
    bias = np.full(len(weight), middle, np.float32) if response == "offset" else None
    maps = client.conv2d(
        picture.colour,
        weight,
        bias,
        padding="same",
        padding_mode="replicate",
        groups=channels,
        data_format="channels_last",
        out_dtype=picture.colour.dtype,
        backend=backend,
        progress=bar,
    )
    rows, columns, _ = picture.colour.shape
    return replace(picture, colour=maps.reshape(rows, columns, channels, len(signs)).max(axis=-1))
