"""`convservice health`: asks a server whether it serves, over the standard health protocol.

The request is empty and the answer has one field, so they are written and read here byte by byte: the
command works with the base install alone, and a container's health check starts quickly.
"""

from __future__ import annotations

import argparse
from enum import IntEnum

import grpc

from convservice.addresses import Address
from convservice.channel import open_channel
from convservice.cli.arguments import DEFAULT_TARGET, add_json, seconds, target
from convservice.cli.command import Command
from convservice.cli.credentials import add_credentials, credentials
from convservice.cli.outcome import Exit
from convservice.cli.output import show_json
from convservice.endpoint import Endpoint

DESCRIPTION = """\
Asks a server whether it serves, with the standard call grpc.health.v1.Health/Check. Exits with 0 when it
does and with 1 in every other case, unreachable included, as health checks of containers expect.
"""

METHOD = "/grpc.health.v1.Health/Check"
_STATUS_FIELD = 0x08  # field 1, a varint


class Serving(IntEnum):
    """What a server says of itself: grpc.health.v1.HealthCheckResponse.ServingStatus."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--target",
        metavar="HOST:PORT",
        type=target,
        default=DEFAULT_TARGET,
        help="the server (default: %(default)s, where `serve` listens by default)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=5.0,
        help="default: %(default)g",
    )
    add_credentials(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the status; 0 for SERVING, 1 for anything else."""
    endpoint = Endpoint.of(arguments.target, **credentials(arguments))
    status, detail = check(endpoint, arguments.timeout)
    if arguments.json:
        show_json({"target": arguments.target, "status": status, "detail": detail})
    else:
        print(f"{arguments.target}: {status}" + (f" ({detail})" if detail else ""))
    return Exit.OK if status == Serving.SERVING.name else Exit.FAILED


def check(endpoint: Endpoint, timeout: float) -> tuple[str, str]:
    """What the server as a whole says, and the reason where it says nothing.

    Args:
        endpoint: the server and how to reach it.
        timeout: seconds to wait for the answer.

    Returns:
        The name of a `Serving` and an empty string, or `"UNREACHABLE"` and the reason.
    """
    with open_channel(endpoint, Address(endpoint.target)) as channel:
        ask = channel.unary_unary(METHOD, request_serializer=bytes, response_deserializer=serving_of)
        try:
            return ask(b"", timeout=timeout, metadata=endpoint.authorization).name, ""
        except grpc.RpcError as exc:
            return "UNREACHABLE", f"{exc.code().name}: {exc.details()}"


def serving_of(message: bytes) -> Serving:
    """The status in a HealthCheckResponse; a field that holds 0 does not travel."""
    if len(message) == 2 and message[0] == _STATUS_FIELD and message[1] in list(Serving):
        return Serving(message[1])
    return Serving.UNKNOWN


COMMAND = Command("health", "ask a server whether it serves", DESCRIPTION, add_arguments, run)
