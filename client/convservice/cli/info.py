"""`convservice info`: what a server is, computes on, accepts and has in use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from convservice.cli.arguments import add_json, add_target
from convservice.cli.command import Command
from convservice.cli.embedded import connected
from convservice.cli.outcome import Exit
from convservice.cli.output import byte_size, show_json, show_table
from convservice.info import BackendInfo, Limits, Usage

DESCRIPTION = """\
Shows a server's version, its backends (the device and libraries of each, or why it cannot run), its limits
and what is in use. The bits of a result are promised per backend, library version and device.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_target(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints what the server says of itself."""
    with connected(arguments) as client:
        info = client.info()
    if arguments.json:
        show_json({"target": client.target, **asdict(info)})
        return Exit.OK
    print(f"convservice {info.version} at {client.target}\n")
    show_table(
        "backends", ("name", "state", "device", "workers ", "versions"), map(_backend_row, info.backends)
    )
    print()
    show_table("limits and use", ("what", "limit ", "in use "), _limit_rows(info.limits, info.usage))
    return Exit.OK


def _backend_row(backend: BackendInfo) -> Sequence[object]:
    if not backend.available:
        return backend.name, f"cannot run: {backend.reason}", "", "", ""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(backend.versions.items()))
    state = "available, the default" if backend.is_default else "available"
    return backend.name, state, backend.device, backend.workers, versions


def _limit_rows(limits: Limits, usage: Usage) -> Iterator[Sequence[object]]:
    yield "memory of running tensors", byte_size(limits.memory_budget_bytes), byte_size(usage.reserved_bytes)
    yield "memory of weights", byte_size(limits.weights_budget_bytes), byte_size(usage.weights_bytes)
    yield "streams", limits.max_streams, usage.streams
    yield "tensors", "", usage.tensors
    yield "networks", "", usage.networks
    yield "message", byte_size(limits.max_message_bytes), ""
    yield "input and outputs of a unary call", byte_size(limits.max_unary_bytes), ""
    yield "weights inline in a call", byte_size(limits.max_inline_weight_bytes), ""
    yield "idle time of a stream", f"{limits.idle_timeout:g} s", ""


COMMAND = Command("info", "show a server's backends and limits", DESCRIPTION, add_arguments, run)
