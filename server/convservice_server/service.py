"""The service: what each call of the contract does, without any transport.

Given request messages (or iterators of them) and the `Call` they belong to, this hands back response messages
(or iterators of them) and raises the errors of `convservice.errors`; a host maps calls and errors to its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

from convservice.bands import TensorSpec
from convservice.errors import ConvServiceError, InvalidRequest, Reason, ResourceExhausted
from convservice.network import NAME_PREFIX
from convservice.unpacking import BandUnpacker
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import (
    ResultSpec,
    report_to_proto,
    request_from_proto,
    result_to_proto,
)
from convservice.wire.networks import network_to_proto
from convservice_backends.interface import SessionPlan
from convservice_backends.registry import Registry
from convservice_backends.registry import Status as BackendStatus
from convservice_server import uploads
from convservice_server.admission import Admission
from convservice_server.calls import Call, Clock
from convservice_server.config import ServerConfig
from convservice_server.faults import draining, warming
from convservice_server.holdings import Holdings
from convservice_server.lanes import Count
from convservice_server.lines import Lines
from convservice_server.observation import Observation
from convservice_server.passage import Engine, Packing, Passage, observed, refused
from convservice_server.store import Store
from convservice_server.streams import TensorStream

DEFAULT_PAGE = 100
LARGEST_PAGE = 1000


class Service:
    """The calls of the contract.

    Args:
        config: the limits.
        registry: the backends; it stays the caller's to close.
        clock: tells the time.
        observation: told of every tensor; log lines alone where not given.

    Attributes:
        warming: whether the backends are still being tried, and everything is refused until they are.
        bands: counts the bands of input that are taken and not computed yet.
    """

    def __init__(
        self,
        config: ServerConfig,
        registry: Registry,
        clock: Clock = time.monotonic,
        observation: Observation | None = None,
    ) -> None:
        self._config = config
        self.registry = registry
        self.store = Store(
            config.weights_budget_bytes,
            config.lease_seconds,
            clock,
            config.max_weights_per_name_bytes,
            config.max_networks_per_name,
        )
        by_name = Holdings("max_bytes_per_name", "bytes of running tensors", config.max_bytes_per_name)
        self.admission = Admission(config.memory_budget_bytes, by_name)
        self.bands = Count()
        observation = Observation([Lines()]) if observation is None else observation
        self._engine = Engine(registry, self.store, self.admission, clock, observation, self.bands)
        self._draining = threading.Event()
        self.warming = False

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Refuses new work from now on; what runs goes on."""
        self._draining.set()

    def convolve(self, request: pb.ConvolveRequest, call: Call) -> pb.ConvolveResponse:
        """One small tensor through one network."""
        self._check_open()
        header = pb.TensorHeader()
        header.CopyFrom(request.header)
        try:
            if request.HasField("network"):
                header.network = self._inline(request, call)
            tensor = request_from_proto(header)
        except ConvServiceError as exc:
            refused(self._engine, call, header, exc)
            raise
        passage = Passage(self._engine, tensor, call)
        passage.meter.queue.add(call.record.arrived, call.record.began)
        passage.meter.receive.add(call.record.began, call.record.received)
        with observed(passage):
            total = _known_size(tensor.spec)
            if len(request.data) != total:
                raise _wrong_size(tensor.spec, total, len(request.data))
            results = passage.start(self._whole_samples(tensor.spec))
            unpacker = BandUnpacker(tensor.spec)
            pieces = [*passage.take(unpacker.feed(0, request.data)), *passage.finish()]
        data = [
            b"".join(piece.data for piece in pieces if piece.output == result.index) for result in results
        ]
        return pb.ConvolveResponse(
            results=[result_to_proto(tensor.tensor_id, result) for result in results],
            done=report_to_proto(tensor.tensor_id, passage.report()),
            data=data,
        )

    def open_stream(self, call: Call) -> TensorStream:
        """A stream of tensors."""
        self._check_open()
        limit = self._config.max_message_bytes
        return TensorStream(self._engine, call, self._draining.is_set, limit)

    def put_weights(self, requests: Iterator[pb.PutWeightsRequest], call: Call) -> pb.PutWeightsResponse:
        """Takes one weight tensor."""
        self._check_open()
        digest = uploads.put_weights(self.store, requests, call)
        return pb.PutWeightsResponse(digest=digest, lease_seconds=self._config.lease_seconds)

    def register_network(self, request: pb.RegisterNetworkRequest, call: Call) -> pb.RegisterNetworkResponse:
        """Keeps a network for its owner."""
        self._check_open()
        limit = self._config.max_inline_weight_bytes
        return pb.RegisterNetworkResponse(
            name=uploads.register(self.store, request.network, call.owner, limit).name
        )

    def get_network(self, request: pb.GetNetworkRequest, call: Call) -> pb.GetNetworkResponse:
        """A network's structure."""
        self._check_open()
        network = self.store.get(call.owner, request.name)
        return pb.GetNetworkResponse(name=request.name, network=network_to_proto(network))

    def list_networks(self, request: pb.ListNetworksRequest, call: Call) -> pb.ListNetworksResponse:
        """The owner's networks, a page at a time; a page's token is the last name before it."""
        self._check_open()
        if request.page_token and not request.page_token.startswith(NAME_PREFIX):
            raise InvalidRequest(
                f"page_token {request.page_token!r} is none that this server gave",
                reason=Reason.INVALID_PARAMETER,
                field="page_token",
            )
        size = min(request.page_size or DEFAULT_PAGE, LARGEST_PAGE)
        names = self.store.names(call.owner, request.page_token, size + 1)
        token = names[size - 1] if len(names) > size else ""
        return pb.ListNetworksResponse(names=names[:size], next_page_token=token)

    def delete_network(self, request: pb.DeleteNetworkRequest, call: Call) -> pb.DeleteNetworkResponse:
        """Drops the owner's reference to a network."""
        self._check_open()
        self.store.delete(call.owner, request.name)
        return pb.DeleteNetworkResponse()

    def get_server_info(self, streams: int) -> pb.GetServerInfoResponse:
        """Version, backends, limits and use; the host knows how many streams it has open."""
        self._check_open()
        config = self._config
        return pb.GetServerInfoResponse(
            version=version("convservice"),
            backends=[_backend_to_proto(status) for status in self.registry.statuses()],
            limits=pb.Limits(
                max_message_bytes=config.max_message_bytes,
                max_unary_bytes=config.max_unary_bytes,
                max_inline_weight_bytes=config.max_inline_weight_bytes,
                memory_budget_bytes=config.memory_budget_bytes,
                weights_budget_bytes=config.weights_budget_bytes,
                max_streams=config.max_streams,
                idle_timeout_ms=round(config.idle_timeout * 1000),
            ),
            usage=pb.Usage(
                reserved_bytes=self.admission.reserved,
                weights_bytes=self.store.used,
                networks=self.store.count,
                streams=streams,
                tensors=self.admission.running,
            ),
        )

    def _check_open(self) -> None:
        if self.draining:
            raise draining()
        if self.warming:
            raise warming()

    def _inline(self, request: pb.ConvolveRequest, call: Call) -> str:
        limit = self._config.max_inline_weight_bytes
        name = uploads.register(self.store, request.network, call.owner, limit).name
        if request.header.network not in ("", name):
            raise InvalidRequest(
                f"the header names {request.header.network!r}, the network that came with it is {name!r}",
                reason=Reason.INVALID_NETWORK,
                field="network",
            )
        return name

    def _whole_samples(self, spec: TensorSpec) -> Callable[[SessionPlan], Packing]:
        """Packs each result as one band per sample, and refuses what is too large for one message."""
        limit = self._config.max_unary_bytes

        def pack(plan: SessionPlan) -> Packing:
            together = _known_size(spec) + sum(_known_size(result.spec) for result in plan.results)
            if together > limit:
                raise ResourceExhausted(
                    f"input and outputs of a unary call have at most {limit} bytes together, these have"
                    f" {together}: send the tensor by ConvolveStream",
                    reason=Reason.UNARY_TOO_LARGE,
                    metadata={"bytes": str(together), "limit": str(limit)},
                )
            return Packing(tuple(_as_one_band(result) for result in plan.results), 2 * together)

        return pack


def _as_one_band(result: ResultSpec) -> ResultSpec:
    spec = result.spec
    whole = TensorSpec(spec.dtype, spec.sample, spec.samples, spec.sample.height, spec.data_format)
    return ResultSpec(result.index, result.name, whole, result.block_rows, result.first_block_input_rows)


def _known_size(spec: TensorSpec) -> int:
    total = spec.total_bytes
    if total is None:
        raise InvalidRequest(
            "a unary call must state the number of rows; a height not known yet goes by ConvolveStream",
            reason=Reason.HEIGHT_REQUIRED,
            field="sample_shape",
        )
    return total


def _wrong_size(spec: TensorSpec, total: int, sent: int) -> InvalidRequest:
    return InvalidRequest(
        f"the tensor has {total} bytes ({spec.samples} samples of {spec.sample} {spec.dtype}), {sent}"
        " were sent",
        reason=Reason.PAYLOAD_SIZE,
        metadata={"expected": str(total), "bytes": str(sent)},
        field="data",
    )


def _backend_to_proto(status: BackendStatus) -> pb.BackendInfo:
    described = status.description
    return pb.BackendInfo(
        name=status.name,
        available=described is not None,
        reason=status.reason,
        is_default=status.is_default,
        device="" if described is None else described.device,
        versions={} if described is None else dict(described.versions),
        workers=0 if described is None else described.workers,
    )
