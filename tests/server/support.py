"""What the server's tests share: a backend whose blocks wait for the test, and tensors as raw messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray

from convservice.bands import Band, TensorSpec
from convservice.dtypes import DType, dtype_of
from convservice.errors import ConvServiceError, from_status
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.network import Network
from convservice.packing import BandPacker
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.v1 import conv_pb2_grpc
from convservice.wire.enums import Precision
from convservice.wire.headers import ResultSpec, TensorRequest, request_to_proto
from convservice.wire.networks import inline_to_proto
from convservice.wire.weights import reference_to_proto
from convservice_backends.interface import Check, Description, SessionPlan
from convservice_backends.registry import Registry
from convservice_server.config import ServerConfig
from convservice_server.health import SERVICE_NAME
from convservice_server.server import Server

WAIT = 30.0
"""Seconds after which something that must happen is taken not to happen."""

Array = NDArray[Any]


class Double:
    """A backend for networks of one 1x1 convolution that counts, and waits or fails when told to."""

    name: ClassVar[str] = "double"

    def __init__(self) -> None:
        self.gate = threading.Event()  # blocks wait for it
        self.gate.set()
        self.entered = threading.Semaphore(0)  # released once per block that has begun
        self.blocks = 0
        self.sessions = 0
        self.prepared = 0
        self.prepare_gate = threading.Event()
        self.prepare_gate.set()
        self.error: Exception | None = None
        self.failure = ""
        self.work: Callable[[], None] = lambda: None
        self.peak_bytes = 1000
        self.prepared_bytes = 0
        self.closed = False

    def describe(self) -> Description:
        return Description("a test", {"double": "1"}, workers=3)

    def prepare(self, network: Network, precision: Precision) -> DoubleNetwork:
        assert self.prepare_gate.wait(WAIT)
        self.prepared += 1
        return DoubleNetwork(self, network)

    def close(self) -> None:
        self.closed = True

    def block(self, check: Check) -> None:
        """One block's work."""
        self.blocks += 1
        self.entered.release()
        assert self.gate.wait(WAIT)
        self.work()
        if self.error is not None:
            raise self.error
        check()

    def wait_for_block(self) -> None:
        """Returns once a block has begun that no earlier call returned for."""
        assert self.entered.acquire(timeout=WAIT)


class DoubleNetwork:
    def __init__(self, backend: Double, network: Network) -> None:
        self.backend = backend
        self.network = network

    @property
    def nbytes(self) -> int:
        return self.backend.prepared_bytes

    def plan(self, spec: TensorSpec, out_dtype: DType | None = None) -> SessionPlan:
        dtype = out_dtype or self.network.dtype(spec.dtype)
        shapes = self.network.shapes(spec.sample)
        results = tuple(
            ResultSpec(index, name, TensorSpec(dtype, shapes[node], spec.samples, 1, spec.data_format), 1, 1)
            for index, (name, node) in enumerate(self.network.outputs.items())
        )
        names = [node.id for node in self.network.nodes]
        return SessionPlan(
            spec,
            dtype,
            results,
            dict.fromkeys(names, "direct"),
            dict.fromkeys(names, 1),
            self.backend.peak_bytes,
        )

    def open(self, plan: SessionPlan, check: Check) -> DoubleSession:
        self.backend.sessions += 1
        return DoubleSession(self, plan, check)


class DoubleSession:
    def __init__(self, prepared: DoubleNetwork, plan: SessionPlan, check: Check) -> None:
        self.prepared = prepared
        self.plan = plan
        self.check = check
        self.closed = False

    def submit(self, band: Band) -> Iterator[Band]:
        (node,) = self.prepared.network.nodes
        assert isinstance(node.layer, Conv)
        weight = node.layer.weight[:, :, 0, 0]
        dtype = self.plan.out_dtype.numpy
        name = self.plan.results[0].name
        for sample, row in np.ndindex(band.array.shape[0], band.array.shape[2]):
            self.prepared.backend.block(self.check)
            given = band.array[sample : sample + 1, :, row : row + 1]
            rows = np.einsum("oc,nc...->no...", weight, given).astype(dtype)
            yield Band(rows, band.sample + sample, band.first_row + row, name)

    def drain(self) -> Iterator[Band]:
        return iter(())

    def finish(self) -> Iterator[Band]:
        return iter(())

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.prepared.backend.sessions -= 1


def pointwise(outputs: int = 1, inputs: int = 1, scale: float = 1.0) -> Network:
    """A 1x1 convolution: every output channel is the sum of the input's, times `scale`."""
    return Network([Conv(np.full((outputs, inputs, 1, 1), scale, np.float32))])


@dataclass
class Running:
    """A server in this process, a raw stub to it, and the backend behind it."""

    server: Server
    backend: Double
    stub: conv_pb2_grpc.ConvServiceStub
    channel: grpc.Channel

    def register(self, network: Network) -> str:
        request = pb.RegisterNetworkRequest(network=inline_to_proto(network))
        return self.stub.RegisterNetwork(request, timeout=WAIT).name

    def info(self) -> pb.GetServerInfoResponse:
        return self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)

    def settle(self) -> None:
        """Returns once no call runs and no stream's reader is left; nothing may be reserved then."""
        assert self.server.wait_idle(WAIT)
        for thread in threading.enumerate():
            if thread.name == "stream-reader":
                thread.join(WAIT)
                assert not thread.is_alive()
        assert self.server.service.admission.reserved == 0
        assert self.server.service.admission.running == 0
        assert self.backend.sessions == 0

    @contextmanager
    def another(self) -> Generator[conv_pb2_grpc.ConvServiceStub]:
        """A stub on a connection of its own."""
        with connect(self.server.port) as channel:
            yield conv_pb2_grpc.ConvServiceStub(channel)

    def is_serving_others(self) -> None:
        """Lets another client convolve, which must succeed."""
        x = np.ones((1, 1, 2, 2), np.float32)
        with self.another() as stub:
            response = stub.Convolve(unary(pointwise(scale=2), x), timeout=WAIT)
        assert np.frombuffer(response.data[0], np.float32).tolist() == [2.0] * 4


def raw(channel: grpc.Channel, method: str) -> Any:
    """A call of any method as bytes in and bytes out, with as many messages each way as one likes."""
    return cast("Any", channel).stream_stream(f"/{SERVICE_NAME}/{method}")


def connect(port: int) -> grpc.Channel:
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])


@contextmanager
def running(**settings: Any) -> Generator[Running]:
    """A server on a free port whose only backend is a `Double`."""
    backend = Double()
    registry = Registry(factories={"double": lambda: backend})
    config = ServerConfig.of(**{"listen": "127.0.0.1:0", "drain_grace": 5.0, **settings})
    with Server(config, registry) as server, connect(server.port) as channel:
        try:
            yield Running(server, backend, conv_pb2_grpc.ConvServiceStub(channel), channel)
        finally:
            backend.gate.set()
            backend.prepare_gate.set()


def weight(value: float = 1.0, size: int = 1) -> Tensor:
    """A filter bank of `size` filters of one weight."""
    return Tensor.of(np.full((size, 1, 1, 1), value, np.float32))


def put_messages(tensor: Tensor, chunk: int = 1 << 20) -> Iterator[pb.PutWeightsRequest]:
    """A tensor as the messages of PutWeights."""
    yield pb.PutWeightsRequest(header=pb.WeightsHeader(tensor=reference_to_proto(tensor)))
    data = bytes(tensor.packed())
    for at in range(0, len(data), chunk):
        yield pb.PutWeightsRequest(chunk=data[at : at + chunk])


def spec_of(x: Array, band_rows: int | None = None) -> TensorSpec:
    sample = SampleShape(x.shape[1], x.shape[2], tuple(x.shape[3:]))
    return TensorSpec(dtype_of(x.dtype), sample, x.shape[0], band_rows or x.shape[2])


def unary(network: Network, x: Array, *, inline: bool = True, **header: Any) -> pb.ConvolveRequest:
    """A unary request, the network inline or by name."""
    request = TensorRequest("" if inline else network.name, spec_of(x), **header)
    return pb.ConvolveRequest(
        header=request_to_proto(request),
        network=inline_to_proto(network) if inline else None,
        data=x.tobytes(),
    )


def header_message(
    network: str, spec: TensorSpec, tensor_id: int = 0, **header: Any
) -> pb.ConvolveStreamRequest:
    request = TensorRequest(network, spec, tensor_id=tensor_id, **header)
    return pb.ConvolveStreamRequest(header=request_to_proto(request))


def payload_message(data: bytes, offset: int = 0, tensor_id: int = 0) -> pb.ConvolveStreamRequest:
    payload = pb.Payload(tensor_id=tensor_id, byte_offset=offset, data=data)
    return pb.ConvolveStreamRequest(payload=payload)


def end_message(tensor_id: int = 0) -> pb.ConvolveStreamRequest:
    return pb.ConvolveStreamRequest(end=pb.End(tensor_id=tensor_id))


def abort_message(tensor_id: int = 0) -> pb.ConvolveStreamRequest:
    return pb.ConvolveStreamRequest(abort=pb.Abort(tensor_id=tensor_id))


def tensor_messages(
    network: str,
    x: Array,
    tensor_id: int = 0,
    *,
    band_rows: int | None = None,
    message_bytes: int = 1 << 20,
    **header: Any,
) -> Iterator[pb.ConvolveStreamRequest]:
    """A tensor as a stream's messages, its payload cut anywhere."""
    spec = spec_of(x, band_rows)
    yield header_message(network, spec, tensor_id, **header)
    packer = BandPacker(spec, message_bytes)
    offset = 0
    for data in [*packer.add(x), *packer.finish()]:
        yield payload_message(data, offset, tensor_id)
        offset += len(data)
    yield end_message(tensor_id)


@dataclass
class Result:
    """What came back for one tensor."""

    headers: list[pb.ResultHeader] = field(default_factory=list[pb.ResultHeader])
    data: bytes = b""
    done: pb.TensorDone | None = None
    error: ConvServiceError | None = None

    @property
    def floats(self) -> list[float]:
        array: NDArray[np.float32] = np.frombuffer(self.data, np.float32)
        found: list[float] = array.tolist()
        return found


def collect(responses: Iterable[pb.ConvolveStreamResponse]) -> dict[int, Result]:
    """The results of networks of one output, by tensor id; checks the protocol on the way."""
    results: dict[int, Result] = {}
    for response in responses:
        kind = response.WhichOneof("message")
        assert kind is not None
        part = getattr(response, kind)
        result = results.setdefault(part.tensor_id, Result())
        assert result.done is None
        assert result.error is None
        if isinstance(part, pb.ResultHeader):
            assert not result.data
            result.headers.append(part)
        elif isinstance(part, pb.ResultPayload):
            assert part.byte_offset == len(result.data)
            result.data += part.data
        elif isinstance(part, pb.TensorDone):
            result.done = part
        else:
            details: list[any_pb2.Any] = list(part.details)
            status = status_pb2.Status(code=part.code, message=part.message, details=details)
            result.error = from_status(status)
    return results


def status_of(exc: grpc.RpcError) -> status_pb2.Status:
    """The google.rpc.Status behind a failed call."""
    status: status_pb2.Status | None = cast("Any", rpc_status).from_call(exc)
    assert status is not None, exc
    return status


def error_of(exc: grpc.RpcError) -> ConvServiceError:
    """The service's error behind a failed call."""
    return from_status(status_of(exc))


class Requests:
    """A request iterator that a test feeds."""

    def __init__(self, first: Iterable[pb.ConvolveStreamRequest] = ()) -> None:
        self._condition = threading.Condition()  # guards the fields below
        self._messages = list(first)
        self._ended = False

    def send(self, *messages: pb.ConvolveStreamRequest) -> None:
        with self._condition:
            self._messages += messages
            self._condition.notify_all()

    def end(self) -> None:
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def __iter__(self) -> Requests:
        return self

    def __next__(self) -> pb.ConvolveStreamRequest:
        with self._condition:
            self._condition.wait_for(lambda: self._messages or self._ended)
            if self._messages:
                return self._messages.pop(0)
            raise StopIteration
