"""The interceptor through which observers see every call.

It stands before all others, so that it sees what they refuse too. Given a call's handler, whatever it is, it
hands gRPC one that counts bytes of messages, takes the time, sends the call's id back, and tells the
observation when a worker has taken the call and when it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import grpc

from convservice.errors import Cancelled, Reason
from convservice.metadata import REQUEST_ID
from convservice_server.faults import as_error
from convservice_server.observation import Observation
from convservice_server.records import UNKNOWN_METHOD, CallRecord
from convservice_server.status import CallFailed

Behavior = Callable[..., Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Calls:
    """The calls that run, and what is known of each.

    Args:
        observation: told of every call.
    """

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        self._records: WeakKeyDictionary[grpc.ServicerContext, CallRecord] = WeakKeyDictionary()

    def record(self, context: grpc.ServicerContext) -> CallRecord:
        """What is known of a call; a new record for one that is not observed."""
        return self._records.get(context) or CallRecord()

    @contextmanager
    def observed(self, record: CallRecord, context: grpc.ServicerContext) -> Generator[None]:
        """Tells observers of a call while its handler runs, and the client its id."""
        record.began = time.monotonic()
        self._records[context] = record
        context.set_trailing_metadata(((REQUEST_ID, record.request_id),))
        self.observation.call_started(record)
        try:
            yield
        except GeneratorExit:
            record.fail(Cancelled("the caller gave the call up", reason=Reason.CANCELLED))
            raise
        except grpc.RpcError:  # gRPC's word for a call that ended while its request was awaited
            record.fail(Cancelled("the call ended before its request came", reason=Reason.CANCELLED))
            record.peer = context.peer()
            raise
        except Exception as exc:
            record.fail(exc.error if isinstance(exc, CallFailed) else as_error(exc))
            record.peer = context.peer()
            raise
        finally:
            record.ended = time.monotonic()
            self.observation.call_ended(record)


class Observing(grpc.ServerInterceptor):
    """Observes every call but for those of some services; the first of a server's interceptors.

    Args:
        calls: knows them.
        unobserved: full names of services whose calls nobody is told of.
    """

    def __init__(self, calls: Calls, unobserved: Collection[str]) -> None:
        self._calls = calls
        self._unobserved = unobserved

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, observed; of a method that there is not, observers are told here."""
        service, _, method = handler_call_details.method.strip("/").partition("/")
        if service in self._unobserved:
            return continuation(handler_call_details)
        handler: Any = continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata
        if handler is None:
            record = CallRecord.of(UNKNOWN_METHOD, metadata)
            record.status = "UNIMPLEMENTED"
            self._calls.observation.call_ended(record)
            return None
        record = CallRecord.of(method, metadata)
        serialize: Callable[[Any], bytes] = handler.response_serializer or bytes
        observed: Handler
        if handler.response_streaming:
            behavior = self._many(handler.stream_stream, serialize, record)
            observed = grpc.stream_stream_rpc_method_handler(behavior, None, None)
        else:
            behavior = self._one(handler.stream_unary, serialize, record)
            observed = grpc.stream_unary_rpc_method_handler(behavior, None, None)
        return observed

    def _one(self, inner: Behavior, serialize: Callable[[Any], bytes], record: CallRecord) -> Behavior:
        def behavior(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            with self._calls.observed(record, context):
                data = serialize(inner(_Counted(requests, record), context))
                record.bytes_out = len(data)
            return data

        return behavior

    def _many(self, inner: Behavior, serialize: Callable[[Any], bytes], record: CallRecord) -> Behavior:
        def behavior(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            with (
                self._calls.observed(record, context),
                closing(inner(_Counted(requests, record), context)) as responses,
            ):
                for response in responses:
                    data = serialize(response)
                    record.bytes_out += len(data)
                    yield data

        return behavior


class _Counted(Iterator[bytes]):
    """The requests as they come, counted; it holds none of them."""

    __slots__ = ("_record", "_requests")

    def __init__(self, requests: Iterator[bytes], record: CallRecord) -> None:
        self._requests = requests
        self._record = record

    def __next__(self) -> bytes:
        data = next(self._requests)
        record = self._record
        record.bytes_in += len(data)
        record.received = time.monotonic()
        return data
