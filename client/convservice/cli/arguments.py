"""Options that commands share, and how their texts become values.

Each parser is given the text behind an option and hands on a value, or raises
`argparse.ArgumentTypeError` with the rule: argparse prints it with the option's name and exits with 2.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.cli.credentials import add_credentials
from convservice.cli.outcome import CommandFailed, Exit
from convservice.files import load
from convservice.layers import Conv
from convservice.network import Network

DEFAULT_TARGET = "127.0.0.1:50051"
"""Where `serve` listens when it is not told otherwise."""

EMBEDDED = "the server; without it one is started on a free port, used and stopped"
"""What `--target` is to most commands."""

CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode", "activation")
"""The options of a convolution, as `Conv` names them."""


def with_lists_joined(arguments: Sequence[str]) -> list[str]:
    """Arguments with a list that starts with a minus joined to its option: `--neuron=-1,0`.

    argparse would take such a list, `-1,0`, for an option; it knows single negative numbers only.
    """
    joined: list[str] = []
    for argument in arguments:
        follows_option = bool(joined) and re.fullmatch(r"--[a-z][a-z-]*", joined[-1]) is not None
        if follows_option and re.fullmatch(r"-\d+[,:][-\d,:]*", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; nan and inf are strings in it"
    )


def add_target(parser: argparse.ArgumentParser, meaning: str = EMBEDDED) -> None:
    """Adds what says where a command sends its requests and how: `--target`, which is `meaning`, `--timeout`,
    and the options of `credentials`."""
    parser.add_argument("--target", metavar="HOST:PORT", type=target, help=meaning)
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, help="for each request (default: no limit)"
    )
    add_credentials(parser)


def add_service(parser: argparse.ArgumentParser) -> None:
    """Adds what says who computes: `--target`, `--timeout` and `--backend`."""
    add_target(parser)
    parser.add_argument("--backend", metavar="NAME", help="what is to compute (default: the server's choice)")


def target(text: str) -> str:
    """`HOST:PORT` as it was given."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]+):(\d{1,5})", text)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT with a port from 1 to 65535, not {text!r}")
    return text


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return value


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas: `"1,3,224,224"`."""
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, not {text!r}")
    return tuple(int(part) for part in text.split(","))


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def one_or_per_axis(text: str) -> int | tuple[int, ...]:
    """One whole number for every axis, `"2"`, or one for each, `"2,1"`."""
    values = integers(text)
    return values[0] if len(values) == 1 else values


def padding(text: str) -> str | int | tuple[int, ...] | tuple[tuple[int, int], ...]:
    """Padding as `conv2d` takes it: `same`, `valid`, `1`, `1,2` per axis, `0:1,2:2` before and after."""
    if text in ("same", "valid"):
        return text
    if re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
        pairs = (part.split(":") for part in text.split(","))
        return tuple((int(before), int(after)) for before, after in pairs)
    try:
        return one_or_per_axis(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be same, valid, 1, 1,2 (per axis) or 0:1,2:2 (before and after), not {text!r}"
        ) from None


def load_array(path: Path) -> NDArray[Any]:
    """The array in a `.npy` file.

    Raises:
        CommandFailed: there is no such file, or it holds no array of numbers.
    """
    try:
        loaded: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        reason = (
            exc.strerror if isinstance(exc, OSError) and exc.strerror else "it is no .npy file of numbers"
        )
        raise CommandFailed(f"cannot read {path}: {reason}", Exit.USAGE) from exc
    if isinstance(loaded, np.lib.npyio.NpzFile):
        raise CommandFailed(f"{path} holds several arrays; a .npy file with one is needed", Exit.USAGE)
    array: NDArray[Any] = loaded
    return array


def load_network(path: Path) -> Network:
    """The network in a file that `convservice.save` wrote.

    Raises:
        CommandFailed: there is no such file, or it cannot be read.
        InvalidRequest: it holds no network; the message names the file.
    """
    try:
        return load(path)
    except OSError as exc:
        raise CommandFailed(f"cannot read {path}: {exc.strerror or exc}", Exit.USAGE) from exc


def add_convolution(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a convolution, as `conv2d` has them; `convolution` makes a layer of them."""
    group = parser.add_argument_group("the convolution; numbers are for all axes or one for each, as in 2,1")
    group.add_argument("--stride", metavar="N", type=one_or_per_axis, help="default: 1")
    group.add_argument(
        "--padding",
        metavar="P",
        type=padding,
        help="same, valid, 1, 1,2 or pairs of before and after: 0:1,2:2 (default: 0)",
    )
    group.add_argument("--dilation", metavar="N", type=one_or_per_axis, help="default: 1")
    group.add_argument("--groups", metavar="N", type=positive, help="default: 1")
    group.add_argument("--padding-mode", choices=("zeros", "reflect", "replicate"), help="default: zeros")
    group.add_argument("--activation", metavar="NAME", help="such as relu or sigmoid (default: linear)")


def convolution_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those options of `add_convolution` that were given, by the names that `Conv` has for them."""
    options = {name: getattr(arguments, name) for name in CONVOLUTION}
    return {name: value for name, value in options.items() if value is not None}


def convolution(
    arguments: argparse.Namespace, weight: NDArray[Any], bias: NDArray[Any] | None = None
) -> Conv:
    """The layer that the options of `add_convolution` describe.

    Args:
        arguments: a command's.
        weight: the filter bank, (out_channels, in_channels / groups, *kernel).
        bias: the thresholds, (out_channels,).

    Raises:
        InvalidRequest: as `Conv` does.
    """
    return Conv(weight, bias, **convolution_options(arguments))
