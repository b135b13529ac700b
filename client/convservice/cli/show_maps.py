"""`convservice show-maps`: what every layer of a network makes of an image, as tiles."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice import ConvClient
from convservice.cli.arguments import add_json, add_service, load_network, positive
from convservice.cli.command import Command
from convservice.cli.embedded import connected
from convservice.cli.images import Picture, read_image
from convservice.cli.outcome import CommandFailed, Exit, missing_extra
from convservice.cli.output import show_json
from convservice.network import NAME_PREFIX, Network
from convservice.summary import type_of

DESCRIPTION = """\
Sends an image through a network on a server, has every layer's feature maps sent back, and tiles them, a
layer below the other. NET is a file that convservice.save wrote, or with --target the name of a network that
is registered there. The image travels as it is, values 0 to 255, as grey or as red, green and blue, whichever
the network takes. Each map is drawn from its smallest value, dark, to its largest.
"""

FORMATS = (".png", ".svg", ".pdf")

_TILE, _GAP, _TEXT = 1.1, 0.08, 0.34
"""Sides of a tile, gaps and the room for a heading, in inches."""

_STRIP_WIDTH, _STRIP_HEIGHT = 4.6, 0.3
"""Sides of the strip that stands for a vector, in inches."""

_A_ROW = 8
"""Tiles beside one another."""

Array = NDArray[Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("image", metavar="IMAGE", type=Path, help="PNG, JPEG, TIFF or what else Pillow reads")
    parser.add_argument(
        "--network", metavar="NET", required=True, help="a file, or a registered network's name"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="a .png, .svg or .pdf (default: IMAGE-maps.png)"
    )
    parser.add_argument(
        "--maps", metavar="N", type=positive, default=16, help="at most so many of each layer (default: 16)"
    )
    add_service(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the image through every layer and writes the tiles."""
    output: Path = arguments.output or Path(f"{arguments.image.stem}-maps.png")
    if output.suffix.lower() not in FORMATS:
        raise CommandFailed(f"-o must end with {', '.join(FORMATS)}, not {output.name!r}", Exit.USAGE)
    picture = read_image(arguments.image)
    with connected(arguments) as client:
        network, maps = _maps(client, picture, arguments)
    _draw(output, network, maps, arguments.maps)
    shapes = {node.id: list(maps[node.id].shape) for node in network.nodes}
    if arguments.json:
        show_json({"image": str(arguments.image), "output": str(output), "layers": shapes})
    else:
        print(f"{output}: the feature maps of {len(shapes)} layer{'s' if len(shapes) > 1 else ''}")
    return Exit.OK


def _maps(
    client: ConvClient, picture: Picture, arguments: argparse.Namespace
) -> tuple[Network, dict[str, Array]]:
    """The network, and every layer's feature maps (channels, *spatial) by the node's id."""
    name: str = arguments.network
    if not name.startswith(NAME_PREFIX):
        network = load_network(Path(name))
        return network, _computed(client, network, picture, arguments.backend)
    if arguments.target is None:
        raise CommandFailed(
            f"a registered network is on the server that keeps it: {name} needs --target HOST:PORT",
            Exit.USAGE,
        )
    network = client.network(name).network
    return network, _computed(client, network, picture, arguments.backend)


def _computed(
    client: ConvClient, network: Network, picture: Picture, backend: str | None
) -> dict[str, Array]:
    every = Network(network.nodes, {node.id: node.id for node in network.nodes})
    x = _input(network, picture)
    found: Any
    if any(tensor.values is None for tensor in network.tensors):
        # The server has the weights: it is told of the same layers with other outputs, for this call.
        registered = client.register(every)
        try:
            found = registered(x, backend=backend)
        finally:
            if every.name != network.name:
                client.unregister(registered)
    else:
        found = client.run(every, x, backend=backend)
    if len(network.nodes) == 1:
        return {network.nodes[0].id: found[0]}
    return {node.id: found[node.id][0] for node in network.nodes}


def _input(network: Network, picture: Picture) -> Array:
    """The image as the network takes it: (1, C, rows, columns)."""
    if network.rank not in (None, 2):
        raise CommandFailed(f"an image has 2 spatial axes, the network's input {network.rank}", Exit.USAGE)
    colour = picture.colour
    wanted = next(
        (channels for node in network.nodes if (channels := getattr(node.layer, "in_channels", 0))),
        colour.shape[2],
    )
    if wanted == 1 and colour.shape[2] == 3:
        grey = colour.astype(np.float64) @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow
        colour = np.rint(grey).astype(colour.dtype)[:, :, None]
    elif wanted == 3 and colour.shape[2] == 1:
        colour = np.repeat(colour, 3, axis=2)
    if colour.shape[2] != wanted:
        raise CommandFailed(
            f"the network takes {wanted} channels, the image has {colour.shape[2]}; grey and colour become"
            " each other",
            Exit.USAGE,
        )
    return np.ascontiguousarray(colour.transpose(2, 0, 1)[None])


def _draw(path: Path, network: Network, maps: Mapping[str, Array], most: int) -> None:
    """Writes the tiles: a heading for each layer, and rows of its maps below."""
    try:
        matplotlib = import_module("matplotlib")
    except ImportError as exc:
        raise missing_extra("matplotlib", "cli") from exc
    blocks = [_Block(f"{node.id}   {type_of(node.layer)}   ", maps[node.id], most) for node in network.nodes]
    width = max(*(block.width for block in blocks), 4 * (_TILE + _GAP)) + 0.4
    height = sum(block.height for block in blocks) + 0.3
    settings: dict[str, Any] = {
        "svg.hashsalt": "convservice",
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
    }
    with matplotlib.rc_context(settings):
        figure = import_module("matplotlib.figure").Figure(figsize=(width, height))
        top = 0.1
        for block in blocks:
            block.draw(figure, top, width, height)
            top += block.height
        kind = path.suffix.lower()[1:]
        key = "Software" if kind == "png" else "Date" if kind == "svg" else "CreationDate"
        try:
            figure.savefig(path, format=kind, dpi=120, metadata={key: None})
        except OSError as exc:
            raise CommandFailed(f"cannot write {path}: {exc.strerror or exc}", Exit.USAGE) from exc


class _Block:
    """One layer's part of the picture: a heading, and its maps as tiles, or one strip where they are numbers.

    Attributes:
        heading: what stands above.
        tiles: the maps that are drawn, each from 0 to 1; one of one row where every map is a number.
        width: in inches.
        height: in inches.
    """

    def __init__(self, heading: str, maps: Array, most: int) -> None:
        values = maps.astype(np.float64)
        numbers = values.size == len(values)
        self.tiles = [_scaled(values.reshape(1, -1))] if numbers else [_scaled(one) for one in values[:most]]
        self._tile = (_STRIP_WIDTH, _STRIP_HEIGHT) if numbers else (_TILE, _TILE)
        left_out = f", the first {most}" if not numbers and most < len(values) else ""
        self.heading = f"{heading}{' x '.join(map(str, maps.shape))}{left_out}"
        beside, below = min(len(self.tiles), _A_ROW), -(-len(self.tiles) // _A_ROW)
        self.width = beside * (self._tile[0] + _GAP)
        self.height = below * (self._tile[1] + _GAP) + _TEXT

    def draw(self, figure: Any, top: float, width: float, height: float) -> None:
        """Draws it `top` inches from the top of a figure of that width and height."""
        middle = 1 - (top + _TEXT * 0.6) / height
        figure.text(0.2 / width, middle, self.heading, fontsize=9, color="#212529", va="center")
        for at, tile in enumerate(self.tiles):
            x = 0.2 + at % _A_ROW * (self._tile[0] + _GAP)
            y = top + _TEXT + at // _A_ROW * (self._tile[1] + _GAP) + self._tile[1]
            box = (x / width, 1 - y / height, self._tile[0] / width, self._tile[1] / height)
            axes = figure.add_axes(box, anchor="NW")
            aspect = "equal" if self._tile[0] == self._tile[1] else "auto"
            axes.imshow(tile, cmap="gray", interpolation="nearest", vmin=0.0, vmax=1.0, aspect=aspect)
            axes.axis("off")


def _scaled(tile: NDArray[np.float64]) -> NDArray[np.float64]:
    """From the smallest finite value, 0, to the largest, 1; what is not finite stays blank."""
    finite = np.where(np.isfinite(tile), tile, np.nan)
    if not np.isfinite(tile).any():
        return finite
    low, high = float(np.nanmin(finite)), float(np.nanmax(finite))
    return (finite - low) / (high - low) if high > low else finite * 0 + 0.5


COMMAND = Command("show-maps", "draw every layer's feature maps of an image", DESCRIPTION, add_arguments, run)
