"""A stream of the contract by hand: every message is sent when the test says so."""

from __future__ import annotations

import queue
import time
from typing import Any, Self, cast

from convservice.bands import Band
from convservice.errors import ConvServiceError
from convservice.exchange import Done, Failed, ResultOpened, ResultReceiver, ResultRows, TensorSender
from convservice.packing import BandPacker
from convservice.v1 import conv_pb2 as pb
from convservice.v1.conv_pb2_grpc import ConvServiceStub
from convservice.wire.headers import ResultSpec, TensorReport, TensorRequest
from tests.helpers import Array, Collector

SECONDS = 60
"""After which a stream that hangs fails its test."""


def usage(stub: ConvServiceStub) -> pb.Usage:
    """What is in use on the server."""
    return stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=SECONDS).usage


def wait_until_nothing_runs(stub: ConvServiceStub) -> None:
    """Asks the server until no stream is open and no tensor runs; fails after a while."""
    end = time.monotonic() + SECONDS
    while (now := usage(stub)).tensors or now.streams or now.reserved_bytes:
        assert time.monotonic() < end, f"still in use: {now}"


class RawStream:
    """One `ConvolveStream` call; a context manager that cancels what is left of it.

    Args:
        stub: the server's calls.
    """

    def __init__(self, stub: ConvServiceStub) -> None:
        self._requests: queue.SimpleQueue[pb.ConvolveStreamRequest | None] = queue.SimpleQueue()
        self._call: Any = stub.ConvolveStream(iter(self._requests.get, None), timeout=SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._requests.put(None)
        self._call.cancel()

    def send(self, message: pb.ConvolveStreamRequest) -> None:
        """Sends a message."""
        self._requests.put(message)

    def receive(self) -> pb.ConvolveStreamResponse:
        """Waits for the next answer; raises `grpc.RpcError` where the stream has ended with an error."""
        return cast("pb.ConvolveStreamResponse", next(self._call))

    def close(self) -> list[pb.ConvolveStreamResponse]:
        """Says that nothing more comes, and waits for what is still to be answered."""
        self._requests.put(None)
        return list(self._call)


class RawTensor:
    """One tensor in a stream, sent row by row.

    Args:
        stream: the stream.
        request: the tensor.
        payload_bytes: tensor bytes in a message.
    """

    def __init__(self, stream: RawStream, request: TensorRequest, payload_bytes: int = 1 << 20) -> None:
        self._stream = stream
        self._sender = TensorSender(request)
        self._packer = BandPacker(request.spec, payload_bytes)
        self._receiver = ResultReceiver(request)
        self.report: TensorReport | None = None
        stream.send(self._sender.header())

    def results(self, count: int = 1) -> list[ResultSpec]:
        """Waits for the headers of `count` outputs."""
        found: list[ResultSpec] = []
        for _ in range(count):
            event = self._receiver.receive(self._stream.receive())
            if isinstance(event, Failed):
                raise event.error
            assert isinstance(event, ResultOpened), "headers come before anything else"
            found.append(event.result)
        return found

    def send_rows(self, rows: Array) -> None:
        """Sends rows (samples, channels, rows, *rest) as far as they fill bands."""
        for data in [*self._packer.add(rows), *self._packer.flush()]:
            self._stream.send(self._sender.payload(data))

    def end(self) -> None:
        """Sends what is left, and the end."""
        for data in self._packer.finish():
            self._stream.send(self._sender.payload(data))
        self._stream.send(self._sender.end())

    def abort(self) -> None:
        """Gives the tensor up."""
        self._stream.send(self._sender.abort())

    def next_bands(self) -> list[Band] | None:
        """Waits for the next answer: rows of a result, or None when the tensor is complete.

        Raises:
            ConvServiceError: the tensor failed.
        """
        event = self._receiver.receive(self._stream.receive())
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            self.report = event.report
            return None
        assert isinstance(event, ResultRows)
        return list(event.bands)

    def collect(self, results: list[ResultSpec]) -> dict[str, Array]:
        """Waits for everything that is still to come, and puts these results together."""
        collector = Collector([result.name for result in results])
        while (bands := self.next_bands()) is not None:
            for band in bands:
                collector.take(band)
        return collector.arrays(results)

    def fail(self) -> ConvServiceError:
        """Waits until the tensor fails; its error."""
        try:
            while self.next_bands() is not None:
                pass
        except ConvServiceError as exc:
            return exc
        raise AssertionError("the tensor was completed")
