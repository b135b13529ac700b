"""A scripted server for the client's tests: it serves networks of one activation (relu), and fails on demand.

Every request is recorded. `fail` lets the next calls of a method fail with a given error; `scripts` replace
the handling of the next streams.
"""

# ruff: noqa: N802 - the methods are named as the contract names its calls

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc import status_pb2

from convservice.bands import Band, TensorSpec
from convservice.errors import ConvServiceError, NetworkNotFound, Reason, to_status
from convservice.exchange import (
    Aborted,
    Ended,
    Opened,
    TensorReceiver,
    result_header,
    result_payload,
    tensor_done,
    tensor_error,
)
from convservice.network import Network
from convservice.packing import BandPacker
from convservice.tensors import Tensor
from convservice.unpacking import BandUnpacker
from convservice.v1 import conv_pb2 as pb
from convservice.v1.conv_pb2_grpc import ConvServiceServicer, add_ConvServiceServicer_to_server
from convservice.wire.headers import (
    ResultSpec,
    TensorReport,
    TensorRequest,
    report_to_proto,
    request_from_proto,
    result_to_proto,
)
from convservice.wire.networks import network_from_proto, network_to_proto
from convservice.wire.weights import weight_from_proto

Script = Callable[["FakeService", Iterator[pb.ConvolveStreamRequest], grpc.ServicerContext], Iterator[Any]]

REPORT = TensorReport("fake", {"layer0": "relu"}, total=0.001)


class FakeService(ConvServiceServicer):
    """The scripted service."""

    def __init__(self) -> None:
        self.networks: dict[str, Network] = {}
        self.weights: dict[bytes, Tensor] = {}
        self.requests: list[tuple[str, Message]] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.failures: defaultdict[str, deque[ConvServiceError]] = defaultdict(deque)
        self.scripts: deque[Script] = deque()
        self.cancelled = threading.Event()
        self.streaming = threading.Event()
        self.streams = 0

    def fail(self, method: str, *errors: ConvServiceError) -> None:
        self.failures[method].extend(errors)

    def count(self, method: str) -> int:
        return sum(1 for name, _ in self.requests if name == method)

    def forget(self) -> None:
        self.networks.clear()
        self.weights.clear()

    def begin(self, method: str, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append((method, request))
        self.metadata.append(dict(context.invocation_metadata()))
        if self.failures[method]:
            refuse(context, self.failures[method].popleft())

    def find(self, name: str) -> Network:
        if name not in self.networks:
            raise NetworkNotFound(f"{name} is not registered here", reason=Reason.NETWORK_NOT_REGISTERED)
        return self.networks[name]

    def keep(self, inline: pb.InlineNetwork) -> Network:
        for weight in inline.weights:
            tensor = weight_from_proto(weight)
            self.weights[tensor.digest] = tensor
        network = network_from_proto(inline.network)
        missing = [t.digest.hex() for t in network.tensors if t.digest not in self.weights]
        if missing:
            metadata = {"digests": missing[0]}  # one at a time, as a server that lists a part may
            raise NetworkNotFound("weights are missing", reason=Reason.WEIGHTS_MISSING, metadata=metadata)
        self.networks[network.name] = network
        return network

    def Convolve(self, request: pb.ConvolveRequest, context: grpc.ServicerContext) -> pb.ConvolveResponse:
        self.begin("Convolve", request, context)
        try:
            if request.HasField("network"):
                self.keep(request.network)
            network = self.find(request.header.network)
            tensor = request_from_proto(request.header)
            result = result_spec(network, tensor, whole=True)
            bands = list(BandUnpacker(tensor.spec).feed(0, request.data))
            data = b"".join(packed(result.spec, bands))
        except ConvServiceError as exc:
            refuse(context, exc)
        return pb.ConvolveResponse(
            results=[result_to_proto(0, result)], done=report_to_proto(0, REPORT), data=[data]
        )

    def ConvolveStream(
        self, request_iterator: Iterator[pb.ConvolveStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ConvolveStreamResponse]:
        self.streams += 1
        if not context.add_callback(self.cancelled.set):
            self.cancelled.set()
        self.streaming.set()
        if self.scripts:
            yield from self.scripts.popleft()(self, request_iterator, context)
        else:
            yield from self.serve(request_iterator)

    def serve(
        self, requests: Iterator[pb.ConvolveStreamRequest], tensors: int = 1 << 60
    ) -> Iterator[pb.ConvolveStreamResponse]:
        """Serves that many tensors honestly, row by row."""
        receiver = TensorReceiver()
        network, result, packer, offset = Network([relu()]), None, None, 0
        for message in requests:
            self.requests.append(("ConvolveStream", message))
            try:
                event = receiver.receive(message)
                if isinstance(event, Opened):
                    network = self.find(event.request.network)
                    result = result_spec(network, event.request, whole=False)
                    packer, offset = BandPacker(result.spec), 0
                    yield result_header(receiver.tensor_id, result)
                    continue
            except ConvServiceError as exc:
                receiver.discard()
                yield tensor_error(receiver.tensor_id, exc)
                continue
            if event is None or isinstance(event, Opened | Aborted) or packer is None or result is None:
                continue
            for band in event.bands:
                for data in [*packer.add(computed(band)), *packer.flush()]:
                    yield result_payload(receiver.tensor_id, 0, offset, data)
                    offset += len(data)
            if isinstance(event, Ended):
                for data in packer.finish():
                    yield result_payload(receiver.tensor_id, 0, offset, data)
                    offset += len(data)
                yield tensor_done(receiver.tensor_id, REPORT)
                tensors -= 1
                if not tensors:
                    return

    def PutWeights(
        self, request_iterator: Iterator[pb.PutWeightsRequest], context: grpc.ServicerContext
    ) -> pb.PutWeightsResponse:
        header = next(request_iterator)
        self.begin("PutWeights", header, context)
        data = b"".join(message.chunk for message in request_iterator)
        reference = header.header.tensor
        weight = pb.WeightTensor(data_type=reference.data_type, shape=reference.shape, data=data)
        tensor = weight_from_proto(weight)
        assert tensor.digest == reference.digest
        self.weights[tensor.digest] = tensor
        return pb.PutWeightsResponse(digest=tensor.digest, lease_seconds=60)

    def RegisterNetwork(
        self, request: pb.RegisterNetworkRequest, context: grpc.ServicerContext
    ) -> pb.RegisterNetworkResponse:
        self.begin("RegisterNetwork", request, context)
        try:
            return pb.RegisterNetworkResponse(name=self.keep(request.network).name)
        except ConvServiceError as exc:
            refuse(context, exc)

    def GetNetwork(
        self, request: pb.GetNetworkRequest, context: grpc.ServicerContext
    ) -> pb.GetNetworkResponse:
        self.begin("GetNetwork", request, context)
        if request.name not in self.networks:
            refuse(context, NetworkNotFound("no such network", reason=Reason.NETWORK_NOT_FOUND))
        return pb.GetNetworkResponse(name=request.name, network=network_to_proto(self.networks[request.name]))

    def ListNetworks(
        self, request: pb.ListNetworksRequest, context: grpc.ServicerContext
    ) -> pb.ListNetworksResponse:
        self.begin("ListNetworks", request, context)
        names = sorted(self.networks)
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(names) else ""
        return pb.ListNetworksResponse(names=names[at : at + 1], next_page_token=more)

    def DeleteNetwork(
        self, request: pb.DeleteNetworkRequest, context: grpc.ServicerContext
    ) -> pb.DeleteNetworkResponse:
        self.begin("DeleteNetwork", request, context)
        self.networks.pop(request.name, None)
        return pb.DeleteNetworkResponse()

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        self.begin("GetServerInfo", request, context)
        backend = pb.BackendInfo(name="fake", available=True, is_default=True, versions={"fake": "1"})
        limits = pb.Limits(max_streams=4, idle_timeout_ms=1500)
        return pb.GetServerInfoResponse(version="1.2", backends=[backend], limits=limits)


def relu() -> Any:
    from convservice import Activation

    return Activation("relu")


def computed(band: Band) -> Any:
    return np.maximum(band.array, 0)


def packed(spec: TensorSpec, bands: list[Band]) -> Iterator[bytes]:
    packer = BandPacker(spec)
    for band in bands:
        yield from packer.add(computed(band))
    yield from packer.finish()


def result_spec(network: Network, tensor: TensorRequest, whole: bool) -> ResultSpec:
    name, node = next(iter(network.outputs.items()))
    sample = network.shapes(tensor.spec.sample)[node]
    dtype = tensor.out_dtype or network.dtype(tensor.spec.dtype)
    rows = sample.height if whole else 1
    spec = TensorSpec(dtype, sample, tensor.spec.samples, rows, tensor.spec.data_format)
    return ResultSpec(0, name, spec, 1, 1)


def refuse(context: grpc.ServicerContext, error: ConvServiceError) -> NoReturn:
    status = to_status(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    context.set_trailing_metadata((("grpc-status-details-bin", status_pb2.Status.SerializeToString(status)),))
    context.abort(code, status.message)
    raise AssertionError("abort raises")


class Refused(grpc.RpcError):
    """An error as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


def hang(
    fake: FakeService, requests: Iterator[pb.ConvolveStreamRequest], context: grpc.ServicerContext
) -> Iterator[pb.ConvolveStreamResponse]:
    """A script that answers nothing until the client gives up."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait()
    yield from ()


def serve_then_break(tensors: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Script:
    """A script that serves so many tensors, or takes the first message, and then breaks the connection."""

    def script(
        fake: FakeService, requests: Iterator[pb.ConvolveStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ConvolveStreamResponse]:
        if tensors:
            yield from fake.serve(requests, tensors)
        else:
            next(requests)
        context.abort(code, "the connection broke")

    return script


class FakeServer:
    """The scripted service behind a port of its own."""

    def __init__(self) -> None:
        self.service = FakeService()
        self._server: grpc.Server | None = None
        self.port = 0
        self.start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        options = (("grpc.so_reuseport", 0),)
        self._server = grpc.server(ThreadPoolExecutor(16), options=options)
        add_ConvServiceServicer_to_server(self.service, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
