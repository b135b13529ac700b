"""A server as a process of its own: ready line, signals, drain, a port that is taken, memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convservice.bands import TensorSpec
from convservice.dtypes import FLOAT32
from convservice.errors import BackendUnavailable, Reason, ServiceUnavailable
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.network import Network
from convservice.v1 import conv_pb2 as pb
from convservice.v1 import conv_pb2_grpc
from convservice.wire.networks import inline_to_proto
from convservice_backends.registry import Registry
from convservice_server.config import ServerConfig
from convservice_server.environment import BLAS_VARIABLES
from convservice_server.server import Server
from tests.server.support import (
    WAIT,
    Double,
    Requests,
    collect,
    connect,
    end_message,
    header_message,
    payload_message,
    pointwise,
    running,
    tensor_messages,
    unary,
)

MIB = 1 << 20
SERVE = """
import sys
from convservice_server.config import ServerConfig
from convservice_server.process import serve
settings = dict(zip(("listen", "backend"), sys.argv[1:]))
sys.exit(serve(ServerConfig.of(**settings, log_format="json", drain_linger=10)))
"""
X = np.arange(12, dtype=np.float32).reshape(1, 1, 4, 3)


class Process:
    """A serving process that has printed its first line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.first_line = process.stdout.readline().strip()
        self.port = int(self.first_line.rpartition(":")[2])

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def log_until(self, message: str) -> list[dict[str, Any]]:
        """The log's lines up to one that says `message`."""
        assert self.process.stderr is not None
        lines: list[dict[str, Any]] = []
        for line in self.process.stderr:
            lines.append(json.loads(line))
            if lines[-1]["message"] == message:
                break
        return lines

    def memory(self, field: str) -> int:
        """Bytes, as the kernel counts them: VmRSS now, VmHWM at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(field))


def start(*settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in BLAS_VARIABLES},
    )


@contextmanager
def serving(listen: str = "127.0.0.1:0") -> Generator[tuple[Process, conv_pb2_grpc.ConvServiceStub]]:
    with start(listen) as process:
        try:
            served = Process(process)
            with connect(served.port) as channel:
                yield served, conv_pb2_grpc.ConvServiceStub(channel)
        finally:
            process.kill()


def register(stub: conv_pb2_grpc.ConvServiceStub, network: Network) -> str:
    request = pb.RegisterNetworkRequest(network=inline_to_proto(network))
    return stub.RegisterNetwork(request, timeout=WAIT).name


def test_it_says_where_it_listens_and_runs_blas_on_one_thread() -> None:
    with serving() as (process, stub):
        assert process.first_line == f"listening on 127.0.0.1:{process.port}"
        response = stub.Convolve(unary(pointwise(scale=2), X), timeout=WAIT)
        assert np.frombuffer(response.data[0], np.float32).tolist() == (2 * X).ravel().tolist()
        environment = Path(f"/proc/{process.process.pid}/environ").read_text().split("\0")
        assert {f"{name}=1" for name in BLAS_VARIABLES} <= set(environment)
        process.signal()
        assert process.process.wait(WAIT) == 0
        lines = process.log_until("stopped")
        (tensor,) = [line for line in lines if line["message"] == "tensor"]
        assert (tensor["status"], tensor["call"], tensor["bytes_in"]) == ("OK", "Convolve", X.nbytes)


def test_sigterm_finishes_what_runs_and_refuses_what_follows() -> None:
    with serving() as (process, stub):
        name = register(stub, pointwise(scale=2))
        header, payload, end = tensor_messages(name, X)
        requests = Requests([header])
        responses = iter(stub.ConvolveStream(requests, timeout=WAIT))
        first = next(responses)
        process.signal()
        process.log_until("draining")
        requests.send(payload, end, *tensor_messages(name, X, 1))
        results = collect_until_closed(first, responses, 2)
        requests.end()
        assert results[0].floats == (2 * X).ravel().tolist()
        assert results[1].error is not None
        assert results[1].error.reason == Reason.DRAINING
        assert process.process.wait(WAIT) == 0
        with pytest.raises(grpc.RpcError) as caught:
            register(stub, pointwise())
        code: Any = caught.value
        assert code.code() is grpc.StatusCode.UNAVAILABLE


def collect_until_closed(
    first: pb.ConvolveStreamResponse, responses: Iterator[pb.ConvolveStreamResponse], tensors: int
) -> dict[int, Any]:
    """The results of so many tensors, whatever the stream's own end says."""

    def some() -> Iterator[pb.ConvolveStreamResponse]:
        yield first
        closed = 0
        while closed < tensors:
            response = next(responses)
            closed += response.WhichOneof("message") in ("done", "error")
            yield response

    return dict(collect(some()))


def test_a_second_signal_ends_it_at_once() -> None:
    with serving() as (process, stub):
        (header, *_) = tensor_messages(register(stub, pointwise()), X)
        requests = Requests([header])
        responses = iter(stub.ConvolveStream(requests, timeout=WAIT))
        next(responses)
        process.signal()
        process.log_until("draining")
        process.signal()
        assert process.process.wait(WAIT) == 2
        requests.end()
        with pytest.raises(grpc.RpcError):
            list(responses)


def test_a_port_that_is_taken_is_a_clear_error() -> None:
    with serving() as (process, _):
        with start(f"127.0.0.1:{process.port}") as second:
            output, errors = second.communicate(timeout=WAIT)
        assert second.returncode == 1
        assert output == ""
        assert f"cannot listen on 127.0.0.1:{process.port}; is the port taken?" in errors
        assert "Traceback" not in errors
        assert "draining" not in errors
        assert "stopped" not in errors


def test_a_host_that_does_not_resolve_is_a_clear_error() -> None:
    with pytest.raises(ServiceUnavailable) as caught, running(listen="256.1.1.1:99"):
        pass
    assert caught.value.message.startswith(
        "cannot listen on 256.1.1.1:99; the host '256.1.1.1' does not resolve ("
    )
    assert "port" not in caught.value.message


def test_a_backend_that_is_not_there_is_a_clear_error() -> None:
    with start("127.0.0.1:0", "abacus") as process:
        output, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, output) == (1, "")
    assert "there is no backend 'abacus'; known are" in errors
    assert "Traceback" not in errors


def test_a_server_that_cannot_start_leaves_nothing() -> None:
    backend = Double()
    backend.failure = "it was constructed"
    registry = Registry(factories={"double": lambda: backend})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServerConfig(listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ServiceUnavailable, match="is the port taken"), Server(config, registry):
            pass
    assert not backend.closed, "the address is taken before any backend is constructed"
    with (
        pytest.raises(BackendUnavailable, match="it was constructed"),
        Server(ServerConfig(listen="127.0.0.1:0"), registry),
    ):
        pass
    assert backend.closed


def test_memory_does_not_grow_with_the_tensor() -> None:
    rows = 512
    weight = np.ones((1, 1, 3, 3), np.float32) / 9
    data = bytes(MIB)

    def requests(name: str) -> Iterator[pb.ConvolveStreamRequest]:
        spec = TensorSpec(FLOAT32, SampleShape(1, 64 * rows, (MIB // 256,)), 1, 64)
        yield header_message(name, spec)
        for number in range(rows):
            yield payload_message(data, number * MIB)
        yield end_message()

    with serving() as (process, stub):
        name = register(stub, Network([Conv(weight, padding=1)]))
        stub.Convolve(unary(pointwise(), X), timeout=WAIT)
        idle = process.memory("VmRSS")
        received = 0
        for response in stub.ConvolveStream(requests(name), timeout=60):
            assert response.WhichOneof("message") != "error"
            received += len(response.payload.data)
        assert received == rows * MIB
        assert process.memory("VmHWM") - idle < 200 * MIB
