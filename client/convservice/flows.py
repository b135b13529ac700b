"""The calls that one method of a client makes, in order, without I/O.

A flow is a generator: it yields each `Call` it wants made and is sent the answer, or has the call's error
thrown in, and returns the method's result. The sync and the async client run the same flows; only how a
call is made differs. Here live the rules of section "the unary call" of the contract: a network travels
inline the first time, its name alone later, and is sent anew where a server lacks it, once a call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from convservice.attempts import is_missing
from convservice.bands import PAYLOAD_BYTES
from convservice.errors import (
    ConvServiceError,
    InternalError,
    InvalidRequest,
    NetworkNotFound,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
)
from convservice.info import ServerInfo, info_from_proto
from convservice.jobs import INLINE_BYTES, Collector, Job
from convservice.known import KnownNetworks
from convservice.network import NAME_PREFIX, Network
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire.networks import inline_to_proto, network_from_proto, network_to_proto
from convservice.wire.weights import reference_to_proto

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One call: the method's name and its request, or what makes an iterator of requests."""

    method: str
    request: Any = None
    requests: Callable[[], Iterator[Any]] | None = None

    def payload(self) -> Any:
        """What the stub's method takes."""
        return self.request if self.requests is None else self.requests()


Flow = Generator[Call, Any, T]

_MOST_INTERRUPTIONS = 3


def fits_inline(network: Network) -> bool:
    """Whether a network's weights are here and may travel inline."""
    tensors = network.tensors
    return all(t.values is not None for t in tensors) and sum(t.nbytes for t in tensors) <= INLINE_BYTES


def convolve(known: KnownNetworks, job: Job, target: str) -> Flow[Collector | None]:
    """A small job by the unary call; None where it is too large for this server's, and must be streamed."""
    network = job.network
    inline = network.name not in known and fits_inline(network)
    if not inline:
        yield from ensure(known, network)
    try:
        response = yield Call("Convolve", job.unary_request(inline))
    except ConvServiceError as exc:
        if exc.reason == Reason.UNARY_TOO_LARGE:
            return None
        if not is_missing(exc) and exc.reason != Reason.INLINE_TOO_LARGE:
            raise
        inline = is_missing(exc) and fits_inline(network)
        if not inline:
            yield from register(known, network)
        response = yield Call("Convolve", job.unary_request(inline))
    known.add(network.name)
    collector = Collector(job, target)
    collector.receive_all(response)
    return collector


def ensure(known: KnownNetworks, network: Network) -> Flow[None]:
    """Registers a network that the server is not known to have.

    A network known by its digests alone has nothing to register: the server must have it.
    """
    if network.name not in known and all(tensor.values is not None for tensor in network.tensors):
        yield from register(known, network)


def ensure_now(known: KnownNetworks, network: Network) -> Flow[None]:
    """The same, whatever the server is known to have: it may have been restarted."""
    known.forget(network.name)
    yield from ensure(known, network)


def register(known: KnownNetworks, network: Network) -> Flow[None]:
    """Registers a network; weights that do not fit inline go ahead, those alone that the server lacks."""
    known.forget(network.name)
    bare = pb.RegisterNetworkRequest(network=pb.InlineNetwork(network=network_to_proto(network)))
    request = bare
    if fits_inline(network):
        request = pb.RegisterNetworkRequest(network=inline_to_proto(network))
    put: set[bytes] = set()
    interruptions = 0
    while True:
        try:
            response = yield Call("RegisterNetwork", request)
            break
        except NetworkNotFound as exc:  # a server may name a part of what it lacks, and the rest later
            lacking = [tensor for tensor in _missing(network, exc) if tensor.digest not in put]
            if exc.reason != Reason.WEIGHTS_MISSING or not lacking:
                raise
        except ResourceExhausted as exc:  # this server's limit is lower
            if exc.reason != Reason.INLINE_TOO_LARGE or request is bare:
                raise
            request = bare
            continue
        try:
            for tensor in lacking:
                yield Call("PutWeights", requests=partial(_uploads, tensor, tensor.packed()))
                put.add(tensor.digest)
        except ServiceUnavailable:
            interruptions += 1
            if interruptions == _MOST_INTERRUPTIONS:
                raise
            put.clear()  # asking again, which gRPC does with patience, tells what has arrived
    if response.name != network.name:
        raise InternalError(
            f"the server names the network {response.name!r}, this client {network.name!r}:"
            " they do not agree on its canonical form",
            reason=Reason.INTERNAL,
            method="RegisterNetwork",
        )
    known.add(network.name)


def _missing(network: Network, exc: NetworkNotFound) -> list[Tensor]:
    """The tensors whose digests the server named; all of them where it named none that the network has."""
    named = set(exc.metadata.get("digests", "").replace(",", " ").split())
    return [t for t in network.tensors if t.digest.hex() in named] or list(network.tensors)


def _uploads(tensor: Tensor, data: memoryview) -> Iterator[pb.PutWeightsRequest]:
    """The messages that put one weight tensor."""
    yield pb.PutWeightsRequest(header=pb.WeightsHeader(tensor=reference_to_proto(tensor)))
    for at in range(0, len(data), PAYLOAD_BYTES):
        yield pb.PutWeightsRequest(chunk=bytes(data[at : at + PAYLOAD_BYTES]))


def get_network(known: KnownNetworks, name: str) -> Flow[Network]:
    """The structure of a registered network, its weights known by their digests."""
    check_name(name)
    response = yield Call("GetNetwork", pb.GetNetworkRequest(name=name))
    network = network_from_proto(response.network)
    if network.name != name:
        raise InternalError(
            f"the server sent the network {network.name!r} for {name!r}",
            reason=Reason.INTERNAL,
            method="GetNetwork",
        )
    known.add(name)
    return network


def list_networks() -> Flow[tuple[str, ...]]:
    """The names of all the caller's registered networks."""
    names: list[str] = []
    token = ""
    while True:
        response = yield Call("ListNetworks", pb.ListNetworksRequest(page_size=1000, page_token=token))
        names.extend(response.names)
        token = response.next_page_token
        if not token:
            return tuple(names)


def unregister(known: KnownNetworks, name: str) -> Flow[None]:
    """Drops the caller's reference to a network."""
    check_name(name)
    known.forget(name)
    yield Call("DeleteNetwork", pb.DeleteNetworkRequest(name=name))


def server_info() -> Flow[ServerInfo]:
    """What the server says about itself."""
    response = yield Call("GetServerInfo", pb.GetServerInfoRequest())
    return info_from_proto(response)


def all_names(found: dict[str, tuple[str, ...] | ConvServiceError]) -> tuple[str, ...]:
    """The names that any server listed, in order.

    Raises:
        ConvServiceError: the first one's, where no server answered.
    """
    return tuple(sorted({name for names in answered(found).values() for name in names}))


def answered(found: dict[str, T | ConvServiceError]) -> dict[str, T]:
    """What the servers said that answered.

    Raises:
        ConvServiceError: the first one's, where no server answered.
    """
    answers = {target: answer for target, answer in found.items() if not isinstance(answer, ConvServiceError)}
    for answer in found.values():
        if isinstance(answer, ConvServiceError) and not answers:
            raise answer
    return answers


def check_forgotten(found: dict[str, ConvServiceError | None]) -> None:
    """Demands that every server has let a network go, and that one of them had it.

    Raises:
        NetworkNotFound: none had it.
        ConvServiceError: a server could not be told.
    """
    errors = [answer for answer in found.values() if answer is not None]
    for error in errors:
        if not isinstance(error, NetworkNotFound) or len(errors) == len(found):
            raise error


def check_name(name: str) -> None:
    """Refuses what is no network's name.

    Raises:
        InvalidRequest: `INVALID_PARAMETER`.
    """
    digest = name.removeprefix(NAME_PREFIX)
    if len(digest) != 64 or digest == name or digest.strip("0123456789abcdef"):
        raise InvalidRequest(
            f"a network's name is {NAME_PREFIX!r} and 64 hexadecimal digits, not {name!r}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": "name", "value": repr(name)},
            field="name",
        )
