"""`convservice example`: the worked example as a page of a book shows it, computed by a server."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.cli.arguments import add_json, add_service
from convservice.cli.command import Command
from convservice.cli.embedded import connected
from convservice.cli.grid import beside, framed, grid, number
from convservice.cli.neuron import neuron_view
from convservice.cli.outcome import Exit
from convservice.cli.output import show_json, styled
from convservice.layers import Conv
from convservice.worked_example import FEATURE_MAP, INPUT, WEIGHT

DESCRIPTION = """\
Prints the worked example: a 5x5 input, a 3x3 filter, what each of the nine neurons looks at and with which
weights, and the feature map that they give together. A server computes it; the command fails if a single
number is wrong.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_service(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Computes the example, prints it and checks it."""
    with connected(arguments) as client:
        computed = client.conv2d(INPUT, WEIGHT, backend=arguments.backend)
    right = np.array_equal(computed, FEATURE_MAP)
    if arguments.json:
        show_json(
            {
                "input": INPUT.tolist(),
                "weight": WEIGHT.tolist(),
                "feature_map": computed.tolist(),
                "expected": FEATURE_MAP.tolist(),
                "exact": right,
            }
        )
    else:
        print("\n".join(_page(computed)))
        print()
        if right:
            print(styled("The feature map is exactly as expected.", "green"))
        else:
            print(styled(f"The feature map is wrong: expected {FEATURE_MAP.tolist()}", "red"))
    return Exit.OK if right else Exit.FAILED


def _page(computed: NDArray[Any]) -> Iterator[str]:
    yield "Nine neurons look at a 5x5 input with one 3x3 filter: stride 1, no padding, threshold 0, linear."
    yield ""
    yield from beside(
        framed("input", grid(INPUT)),
        framed("filter", grid(WEIGHT)),
        framed("feature map", grid(computed)),
        gap=6,
    )
    yield ""
    yield "What each neuron looks at, the weight beside each value, and what the products add up to:"
    for row in range(3):
        yield ""
        yield from beside(*(_panel((row, column), computed[row, column]) for column in range(3)), gap=5)


def _panel(neuron: tuple[int, int], value: float) -> list[str]:
    """The input with the neuron's receptive field marked, as lines of equal width."""
    rows, columns = neuron_view(Conv(WEIGHT[None, None]), INPUT[None], neuron).axes
    lines: list[str] = []
    for i, line in enumerate(INPUT):
        cells: list[str] = []
        for j, x in enumerate(line):
            if i in rows and j in columns:
                weight = WEIGHT[i - rows[0], j - columns[0]]
                cells.append(styled(f" {number(x)}{_subscript(weight)}", "inverse"))
            else:
                cells.append(f" {number(x)} ")
        lines.append("".join(cells))
    return framed(f"neuron {neuron} = {number(value):>2}", lines)


def _subscript(weight: float) -> str:
    return number(weight).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


COMMAND = Command("example", "print the worked example", DESCRIPTION, add_arguments, run)
