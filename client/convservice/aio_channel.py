"""The async client's connection: the twin of `channel.Connection`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import grpc
import grpc.aio

from convservice.addresses import Address
from convservice.channel import channel_options, closed_error
from convservice.endpoint import Endpoint
from convservice.errors import Cancelled, Reason
from convservice.metadata import identified
from convservice.rpc_errors import error_of
from convservice.v1 import conv_pb2 as pb
from convservice.v1.conv_pb2_grpc import ConvServiceStub

_WRITE_FAILED = "Internal error from Core"

T = TypeVar("T")


class AsyncConnection:
    """One channel for the event loop it is used in, opened when it is first needed; see `Connection`."""

    def __init__(self, endpoint: Endpoint, address: Address, lone: bool = True) -> None:
        self._endpoint = endpoint
        self._address = address
        self._lone = lone
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def target(self) -> str:
        """The server."""
        return self._address.target

    def stub(self) -> Any:
        """The service's methods over this loop's channel.

        Raises:
            InvalidRequest: the client is closed.
        """
        if self._closed:
            raise closed_error(self.target)
        loop = asyncio.get_running_loop()
        if self._channel is None or self._loop is not loop:
            self._channel, self._loop = self._open(), loop
            self._stub = ConvServiceStub(self._channel)
        return self._stub

    async def unary(self, method: str, request: Any, timeout: float | None) -> Any:  # noqa: ASYNC109 - gRPC's own
        """The answer of a call with one answer; `request` is a message, or an iterator of messages."""
        request_id, metadata = identified(self._endpoint.authorization)
        call = getattr(self.stub(), method)(request, timeout=timeout, metadata=metadata)
        status = _status_of(call)
        try:
            return await call
        except grpc.RpcError as exc:
            cause = await _cause(exc, status)
            raise error_of(cause, self.target, method, timeout, request_id) from cause
        except asyncio.CancelledError:
            raise cancelled(method, self.target) from None

    def stream(self, timeout: float | None) -> AsyncStream:
        """Starts a `ConvolveStream` call."""
        request_id, metadata = identified(self._endpoint.authorization)
        call = self.stub().ConvolveStream(timeout=timeout, metadata=metadata)
        return AsyncStream(call, self.target, timeout, request_id)

    async def close(self) -> None:
        """Closes the channel; what runs on it is cancelled."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _open(self) -> grpc.aio.Channel:
        target, options = self._address.target, channel_options(self._address, self._lone)
        credentials = self._endpoint.credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, credentials, options=options)


class AsyncStream:
    """A `ConvolveStream` call, started with `timeout` under an id."""

    def __init__(self, call: Any, target: str, timeout: float | None, request_id: str) -> None:
        self._request_id = request_id
        self._call = call
        self._target = target
        self._timeout = timeout
        self._status = _status_of(call)

    @property
    def over(self) -> bool:
        """Whether the call has ended; answers may be left."""
        return self._status.done()

    def when_over(self, callback: Callable[[], None]) -> None:
        """Calls back once the call has ended."""
        self._status.add_done_callback(lambda _: callback())

    async def write(self, message: pb.ConvolveStreamRequest) -> bool:
        """Writes a message; false when the call has ended, and why, its answers tell."""
        try:
            await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            return False
        return True

    async def done_writing(self) -> None:
        """Says that no more messages will come."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.done_writing()

    async def answer(self) -> pb.ConvolveStreamResponse | None:
        """The next answer; None at the end."""
        try:
            answer: pb.ConvolveStreamResponse | None = await anext(aiter(self._call), None)
        except grpc.RpcError as exc:
            cause = await _cause(exc, self._status)
            error = error_of(cause, self._target, "ConvolveStream", self._timeout, self._request_id)
            raise error from cause
        except asyncio.CancelledError:
            raise cancelled("ConvolveStream", self._target) from None
        return answer

    def cancel(self) -> None:
        """Cancels the call, unless it has ended."""
        self._call.cancel()


def _status_of(call: Any) -> asyncio.Future[grpc.RpcError]:
    """The status that a call will end with.

    A write to a call that has just ended fails, and gRPC's asyncio then puts an internal error of its own in
    the place of the call's status, before or after that has come. So the status is taken when it comes.
    """
    status: asyncio.Future[grpc.RpcError] = asyncio.get_running_loop().create_future()

    def ended(call: Any) -> None:
        code, details = _now(call.code()), _now(call.details())
        if details != _WRITE_FAILED and not status.done():
            trailing = _now(call.trailing_metadata())
            status.set_result(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details))

    call.add_done_callback(ended)
    return status


async def _cause(exc: grpc.RpcError, status: asyncio.Future[grpc.RpcError]) -> grpc.RpcError:
    """The error that a call ended with, where gRPC raised `exc`."""
    return await status if exc.details() == _WRITE_FAILED else exc


def cancelled(method: str, target: str) -> BaseException:
    """gRPC says alike that this task and that the call was cancelled; only one is an error of ours."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return asyncio.CancelledError()
    return Cancelled(
        "the call was cancelled on this side", reason=Reason.CANCELLED, target=target, method=method
    )


def _now(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine that has nothing to wait for hands back."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    raise RuntimeError("the status of a call that has ended was not there")
