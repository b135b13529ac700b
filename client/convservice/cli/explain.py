"""`convservice explain`: one neuron taken apart, beside what a server computed for it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.cli.arguments import (
    add_convolution,
    add_json,
    add_service,
    convolution,
    integers,
    load_array,
    positive,
)
from convservice.cli.command import Command
from convservice.cli.embedded import connected
from convservice.cli.grid import beside, framed, grid, number
from convservice.cli.neuron import NeuronView, neuron_view
from convservice.cli.outcome import CommandFailed, Exit
from convservice.cli.output import show_json, styled
from convservice.dtypes import DTYPES
from convservice.layers import Conv
from convservice.worked_example import INPUT, WEIGHT

DESCRIPTION = """\
Shows one neuron: the values in its receptive field, the weight on each, the products, their sum, the
threshold and the activation, and compares the result with what a server computed for it. Without --input
and --weight it shows a neuron of the worked example. Values in parentheses lie in the padding.

Arrays come from .npy files: the input as (N, C, *spatial), (C, *spatial), or bare with a bare filter; the
filter bank as (out_channels, in_channels / groups, *kernel). Integers that the service does not take are
read as float64, and whole-number weights as the input's float type.
"""


@dataclass(frozen=True)
class Problem:
    """A convolution with its input.

    Attributes:
        layer: the convolution.
        batch: (N, in_channels, *spatial).
    """

    layer: Conv
    batch: NDArray[Any]


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
    parser.add_argument("--input", metavar="FILE.npy", type=Path, help="the input")
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
    """Takes the neuron apart here, has the layer computed there, and compares."""
    problem = _problem(arguments)
    layer, batch = problem.layer, problem.batch
    if not 0 <= arguments.sample < len(batch):
        raise CommandFailed(
            f"--sample must be from 0 to {len(batch) - 1}, not {arguments.sample}", Exit.USAGE
        )
    index = arguments.neuron or (0,) * layer.rank
    view = neuron_view(layer, batch[arguments.sample], index, arguments.channel)
    with connected(arguments) as client:
        feature_maps = client.run(layer, batch, backend=arguments.backend)
    computed = feature_maps[(arguments.sample, view.channel, *view.neuron)]
    agree, verdict = _verdict(view, computed)
    if arguments.json:
        show_json(_as_json(view, float(computed), agree))
    else:
        print("\n".join(_page(problem, view, arguments.slices)))
        print(f"{'computed by the server':24}{number(computed):>14}", end="  ")
        print(styled(verdict, "green" if agree else "red"))
    return Exit.OK if agree else Exit.FAILED


def _problem(arguments: argparse.Namespace) -> Problem:
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
    return Problem(layer, x[None] if x.ndim == layer.rank + 1 else x)


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


def _page(problem: Problem, view: NeuronView, most: int) -> Iterator[str]:
    names = ("rows", "columns") if problem.layer.rank == 2 else ("planes", "rows", "columns")
    where = ", ".join(
        f"{name if problem.layer.rank > 1 else 'elements'} {axis[0]} to {axis[-1]}"
        + (f" in steps of {axis.step}" if axis.step > 1 else "")
        for name, axis in zip(names, view.axes, strict=False)
    )
    yield f"Neuron {view.neuron} of channel {view.channel} looks at {where}"
    yield f"of an input of shape {problem.batch.shape[1:]}, {view.values.size} values in all."
    slices = list(_slices(view))
    for title, *blocks in slices[:most]:
        yield ""
        if len(slices) > 1:
            yield str(title)
        value, weight, product = blocks
        yield from beside(framed("value", value), framed("weight", weight), framed("product", product), gap=6)
    if len(slices) > most:
        yield ""
        yield f"... and {len(slices) - most} more like these (--slices {len(slices)} shows all)"
    yield ""
    yield f"{f'sum of the {view.values.size} products':24}{number(view.total):>14}"
    yield f"{'threshold (bias)':24}{number(view.threshold):>14}"
    yield f"{f'activation {view.function}':24}{number(view.expected):>14}"


def _slices(view: NeuronView) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """The receptive field as grids of rows and columns: title, values, weights, products."""
    planes = view.values.reshape(-1, *np.atleast_2d(view.inside).shape[-2:])
    weights, products = view.weights.reshape(planes.shape), view.products.reshape(planes.shape)
    inside = np.broadcast_to(view.inside, view.values.shape).reshape(planes.shape)
    depth = len(planes) // len(view.values)
    for at, (values, weight, product, real) in enumerate(zip(planes, weights, products, inside, strict=True)):
        channel, plane = divmod(at, depth)
        title = f"channel {view.first_channel + channel}"
        if depth > 1:
            title += f", plane {view.axes[0][plane]}"
        yield title, grid(values, ~real), grid(weight), grid(product)


def _as_json(view: NeuronView, computed: float, agree: bool) -> dict[str, Any]:
    return {
        "neuron": list(view.neuron),
        "channel": view.channel,
        "receptive_field": [list(axis) for axis in view.axes],
        "input_channels": [view.first_channel, view.first_channel + len(view.values)],
        "values": view.values.tolist(),
        "in_padding": (~view.inside).tolist(),
        "weights": view.weights.tolist(),
        "products": view.products.tolist(),
        "sum": view.total,
        "threshold": view.threshold,
        "activation": view.function,
        "expected": view.expected,
        "computed": computed,
        "bound": view.bound,
        "agree": agree,
    }


COMMAND = Command("explain", "show what one neuron looks at and adds up", DESCRIPTION, add_arguments, run)
