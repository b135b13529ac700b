"""`convservice explain`: one neuron taken apart, beside what a server computed for it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice import ConvClient
from convservice.cli.arguments import (
    add_convolution,
    add_json,
    add_service,
    convolution,
    convolution_options,
    integers,
    load_array,
    load_network,
    positive,
)
from convservice.cli.command import Command
from convservice.cli.drawing import FORMATS, draw
from convservice.cli.embedded import connected
from convservice.cli.grid import beside, framed, grid, number
from convservice.cli.neuron import NeuronView, Windowed, neuron_view
from convservice.cli.outcome import CommandFailed, Exit
from convservice.cli.output import show_json, styled
from convservice.dtypes import DTYPES
from convservice.layers import Layer
from convservice.network import Network
from convservice.nodes import INPUT as INPUT_ID
from convservice.nodes import Node
from convservice.worked_example import INPUT, WEIGHT

DESCRIPTION = """\
Shows one neuron: the values in its receptive field, the weight on each, the products, their sum, the
threshold and the activation, and compares the result with what a server computed for it. Without --input
and --weight it shows a neuron of the worked example. Values in parentheses lie in the padding. With -o it
draws the input, the neuron's receptive field with the weights laid over it, and the feature map: as a
picture, or as an animation of every neuron in turn.

With --network it shows a layer of a network in a file: any convolution or pooling.

Arrays come from .npy files: the input as (N, C, *spatial), (C, *spatial), or bare with a bare filter; the
filter bank as (out_channels, in_channels / groups, *kernel). Integers that the service does not take are
read as float64, and whole-number weights as the input's float type.
"""


MOST_NEURONS = 400
"""Neurons that are shown in turn."""


@dataclass(frozen=True)
class Problem:
    """A layer of a network, and the network's input.

    Attributes:
        network: the network; for a convolution from files or the worked example one of that layer.
        node: the layer's node.
        batch: (N, in_channels, *spatial), the network's input.
    """

    network: Network
    node: Node
    batch: NDArray[Any]

    @property
    def layer(self) -> Layer:
        """The layer that is explained."""
        return self.node.layer

    @property
    def title(self) -> str:
        """What a picture of it is called."""
        return (
            self.layer.type_name
            if len(self.network.nodes) == 1
            else f"{self.node.id} ({self.layer.type_name})"
        )

    def compute(self, client: ConvClient, backend: str | None) -> tuple[NDArray[Any], NDArray[Any]]:
        """What the layer is given and what it gives, as the server computes them: (N, channels, *spatial)."""
        source, target = self.node.inputs[0], self.node.id
        if source == INPUT_ID:
            return self.batch, client.run(
                Network(self.network.nodes, {"map": target}), self.batch, backend=backend
            )
        outputs = {"given": source, "map": target}
        found = client.run(Network(self.network.nodes, outputs), self.batch, backend=backend)
        return found["given"], found["map"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--neuron",
        metavar="I,J",
        type=integers,
        help="its position in the feature map, one number per spatial axis (default: the first)",
    )
    parser.add_argument("--channel", metavar="N", type=int, default=0, help="its channel (default: 0)")
    parser.add_argument(
        "--sample", metavar="N", type=int, default=0, help="its sample in a batch (default: 0)"
    )
    parser.add_argument("--every", action="store_true", help="every neuron of the channel in turn")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="draws it: a .png, an .svg or an animated .gif"
    )
    parser.add_argument("--input", metavar="FILE.npy", type=Path, help="the input")
    parser.add_argument(
        "--network", metavar="FILE", type=Path, help="a network that convservice.save wrote, beside --input"
    )
    parser.add_argument(
        "--layer", metavar="ID", help="which of its layers (default: its first convolution or pooling)"
    )
    parser.add_argument("--weight", metavar="FILE.npy", type=Path, help="the filter bank")
    parser.add_argument("--bias", metavar="FILE.npy", type=Path, help="the thresholds, (out_channels,)")
    parser.add_argument(
        "--rank",
        type=int,
        choices=(1, 2, 3),
        help="spatial axes (default: those of the filter bank, or of a bare filter with one or two axes)",
    )
    add_convolution(parser)
    add_service(parser)
    parser.add_argument(
        "--slices", metavar="N", type=positive, default=8, help="at most so many grids are shown (default: 8)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Takes neurons apart here, has the layer computed there, compares, and draws."""
    problem = _problem(arguments)
    if not 0 <= arguments.sample < len(problem.batch):
        raise CommandFailed(
            f"--sample must be from 0 to {len(problem.batch) - 1}, not {arguments.sample}", Exit.USAGE
        )
    _check_output(arguments)
    with connected(arguments) as client:
        given, maps = problem.compute(client, arguments.backend)
    sample, feature_map = given[arguments.sample], maps[arguments.sample]
    views = [
        neuron_view(problem.layer, sample, index, arguments.channel)
        for index in _neurons(arguments, feature_map.shape[1:])
    ]
    computed = [feature_map[(view.channel, *view.neuron)] for view in views]
    verdicts = [_verdict(view, value) for view, value in zip(views, computed, strict=True)]
    agree = all(one for one, _ in verdicts)
    shown = [
        _as_json(view, float(value), one)
        for view, value, (one, _) in zip(views, computed, verdicts, strict=True)
    ]
    if arguments.output is not None:
        draw(arguments.output, views, sample, feature_map[arguments.channel], problem.title)
    if arguments.json:
        show_json({"neurons": shown} if arguments.every else shown[0])
    elif arguments.output is not None:
        print(f"{arguments.output}: {len(views)} neuron{'s' if len(views) > 1 else ''} of {problem.title}")
    else:
        for view, value, (one, verdict) in zip(views, computed, verdicts, strict=True):
            print("\n".join(_page(sample.shape, view, arguments.slices)))
            print(f"{'computed by the server':24}{number(value):>14}", end="  ")
            print(styled(verdict, "green" if one else "red"))
            print(end="\n" if view is not views[-1] else "")
    return Exit.OK if agree else Exit.FAILED


def _check_output(arguments: argparse.Namespace) -> None:
    """Decides between one neuron and all, by what was asked for and by the format of the picture."""
    output: Path | None = arguments.output
    suffix = "" if output is None else output.suffix.lower()
    if output is not None and suffix not in FORMATS:
        raise CommandFailed(f"-o must end with {', '.join(FORMATS)}, not {output.name!r}", Exit.USAGE)
    if arguments.every and arguments.neuron is not None:
        raise CommandFailed("--every is for all neurons and --neuron for one: give one of them", Exit.USAGE)
    if arguments.every and suffix in (".png", ".svg"):
        raise CommandFailed("--every makes an animation: give -o a name that ends with .gif", Exit.USAGE)
    if suffix == ".gif" and arguments.neuron is None:
        arguments.every = True


def _neurons(arguments: argparse.Namespace, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The positions of the neurons to show."""
    if not arguments.every:
        return [arguments.neuron or (0,) * len(sizes)]
    if int(np.prod(sizes)) > MOST_NEURONS:
        raise CommandFailed(
            f"the feature map has {'x'.join(map(str, sizes))} neurons; at most {MOST_NEURONS} are shown in"
            " turn: choose one with --neuron",
            Exit.USAGE,
        )
    return list(np.ndindex(*sizes))


def _problem(arguments: argparse.Namespace) -> Problem:
    if arguments.network is not None:
        return _network_problem(arguments)
    if arguments.layer is not None:
        raise CommandFailed("--layer names a layer of a network: it needs --network", Exit.USAGE)
    if (arguments.input is None) != (arguments.weight is None):
        raise CommandFailed("--input and --weight go together: give both or neither", Exit.USAGE)
    x = INPUT if arguments.input is None else _readable(load_array(arguments.input))
    weight = WEIGHT if arguments.weight is None else load_array(arguments.weight)
    if arguments.weight is None and arguments.rank not in (None, weight.ndim):
        raise CommandFailed(
            f"the worked example has rank {weight.ndim}: --rank {arguments.rank} needs --input and --weight",
            Exit.USAGE,
        )
    own = x.dtype if x.dtype.kind == "f" else np.dtype(np.float32)
    weight = weight.astype(own) if weight.dtype.kind in "iub" else weight
    bias = None if arguments.bias is None else load_array(arguments.bias).astype(weight.dtype)
    rank = arguments.rank or (weight.ndim - 2 if weight.ndim > 2 else weight.ndim)
    if weight.ndim == rank:
        weight = weight[None, None]
        x = x[None] if x.ndim == rank else x
    layer = convolution(arguments, weight, bias)
    if x.ndim not in (layer.rank + 1, layer.rank + 2):
        raise CommandFailed(
            f"a filter bank {layer.weight.shape} takes an input (N, C, *spatial) or (C, *spatial) with"
            f" {layer.rank} spatial axes, not one of shape {x.shape}",
            Exit.USAGE,
        )
    network = Network([layer])
    return Problem(network, network.nodes[0], x[None] if x.ndim == layer.rank + 1 else x)


def _network_problem(arguments: argparse.Namespace) -> Problem:
    """A layer of a network in a file."""
    names = [name for name in ("weight", "bias", "rank") if getattr(arguments, name) is not None]
    options = [f"--{name.replace('_', '-')}" for name in (*names, *convolution_options(arguments))]
    if options:
        raise CommandFailed(
            f"the layers of {arguments.network} have their own weights and geometry: it takes no"
            f" {', '.join(options)}",
            Exit.USAGE,
        )
    if arguments.input is None:
        raise CommandFailed("--network needs --input, the network's input in a .npy file", Exit.USAGE)
    network = load_network(arguments.network)
    node = _node(network, arguments)
    x = _readable(load_array(arguments.input))
    rank = x.ndim - 2 if network.rank is None else network.rank
    return Problem(network, node, x[None] if x.ndim == rank + 1 else x)


def _node(network: Network, arguments: argparse.Namespace) -> Node:
    """The node that --layer names, or the first with windows."""
    drawn = [node for node in network.nodes if isinstance(node.layer, Windowed)]
    known = ", ".join(node.id for node in drawn) or "none"
    if arguments.layer is None and drawn:
        return drawn[0]
    for node in drawn:
        if node.id == arguments.layer:
            return node
    raise CommandFailed(
        f"--layer must name a convolution or pooling of {arguments.network}, which has: {known}; not"
        f" {arguments.layer!r}",
        Exit.USAGE,
    )


def _readable(x: NDArray[Any]) -> NDArray[Any]:
    """`x`, or as float64 where it holds integers of a type that the service does not take."""
    known = {dtype.name for dtype in DTYPES}
    return x.astype(np.float64) if x.dtype.kind in "iub" and x.dtype.name not in known else x


def _verdict(view: NeuronView, computed: Any) -> tuple[bool, str]:
    """Whether the server's number, a scalar of the result's dtype, is as promised, and what to say of it."""
    value = float(computed)
    if value == view.expected or (np.isnan(value) and np.isnan(view.expected)):
        return True, "the same"
    with np.errstate(over="ignore"):
        nearest = float(computed.dtype.type(view.expected))  # infinite where the dtype ends before
    error = abs(value - view.expected)
    if value == nearest or (np.isfinite(error) and error <= view.bound):
        return True, "the same but for rounding"
    return False, f"differs by more than {number(view.bound)}" if np.isfinite(view.bound) else "differs"


def _page(shape: tuple[int, ...], view: NeuronView, most: int) -> Iterator[str]:
    rank = len(view.axes)
    names = {1: ("elements",), 2: ("rows", "columns"), 3: ("planes", "rows", "columns")}[rank]
    where = ", ".join(
        (f"{name} {axis[0]} to {axis[-1]}" if axis else f"no {name}")
        + (f" in steps of {axis.step}" if axis.step > 1 else "")
        for name, axis in zip(names, view.axes, strict=True)
    )
    yield f"Neuron {view.neuron} of channel {view.channel} looks at {where}"
    yield f"of an input of shape {shape}, {view.values.size} values in all."
    slices = list(_slices(view))
    for title, *blocks in slices[:most]:
        yield ""
        if len(slices) > 1:
            yield str(title)
        titles = ("value", "weight", "product")[: len(blocks)]
        yield from beside(*(framed(*pair) for pair in zip(titles, blocks, strict=True)), gap=6)
    if len(slices) > most:
        yield ""
        yield f"... and {len(slices) - most} more like these (--slices {len(slices)} shows all)"
    yield ""
    if view.weights is None:
        real = int(view.inside.sum())
        what = f"sum of {real} over {view.divisor}" if view.divisor else f"largest of {real}"
        yield f"{what:24}{number(view.total):>14}"
        return
    yield f"{f'sum of the {view.values.size} products':24}{number(view.total):>14}"
    yield f"{'threshold (bias)':24}{number(view.threshold):>14}"
    yield f"{f'activation {view.function}':24}{number(view.expected):>14}"


def _slices(view: NeuronView) -> Iterator[tuple[str | list[str], ...]]:
    """The receptive field as grids of rows and columns: title, values, and of weighted layers weights and
    products."""
    shape = (-1, *np.atleast_2d(view.inside).shape[-2:])
    if not view.values.size:
        return
    planes = view.values.reshape(shape)
    inside = np.broadcast_to(view.inside, view.values.shape).reshape(planes.shape)
    depth = len(planes) // len(view.values)
    for at in range(len(planes)):
        channel, plane = divmod(at, depth)
        title = f"channel {view.first_channel + channel}"
        if depth > 1:
            title += f", plane {view.axes[0][plane]}"
        weighted = [
            grid(part.reshape(shape)[at]) for part in (view.weights, view.products) if part is not None
        ]
        yield title, grid(planes[at : at + 1][0], ~inside[at : at + 1][0]), *weighted


def _as_json(view: NeuronView, computed: float, agree: bool) -> dict[str, Any]:
    return {
        "neuron": list(view.neuron),
        "channel": view.channel,
        "receptive_field": [list(axis) for axis in view.axes],
        "input_channels": [view.first_channel, view.first_channel + len(view.values)],
        "values": view.values.tolist(),
        "in_padding": (~view.inside).tolist(),
        "weights": None if view.weights is None else view.weights.tolist(),
        "products": None if view.products is None else view.products.tolist(),
        "sum": view.total,
        "threshold": view.threshold,
        "activation": view.function,
        "expected": view.expected,
        "computed": computed,
        "bound": view.bound,
        "agree": agree,
    }


COMMAND = Command("explain", "show what one neuron looks at and adds up", DESCRIPTION, add_arguments, run)
