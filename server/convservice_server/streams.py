"""A stream of tensors: request messages in, response messages out.

Given an iterator of `ConvolveStreamRequest` in the order they came, `TensorStream.run` hands on the
responses, each computed when it is asked for: as long as nobody takes a response, no request is read. It
holds one request and one band of output, whatever the tensor's size. A tensor that fails is answered and the
stream goes on; a message that the protocol does not allow, or whatever the requests' iterator raises, ends
the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from convservice import exchange
from convservice.bands import PAYLOAD_BYTES, DataFormat
from convservice.errors import Cancelled, ConvServiceError, Reason
from convservice.exchange import Aborted, Ended, FramingError, Opened, Rows, TensorReceiver
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import TensorRequest
from convservice_backends.interface import SessionPlan
from convservice_server.calls import Call, WaitEnded
from convservice_server.faults import as_error, draining
from convservice_server.passage import AtHand, Engine, Packing, Passage, nothing_at_hand, observed, refused

Requests = Iterator[pb.ConvolveStreamRequest]
Responses = Generator[pb.ConvolveStreamResponse, None, None]


class TensorStream:
    """One stream's tensors.

    Args:
        engine: what they pass through.
        call: whose they are.
        is_draining: whether new tensors are to be refused.
        message_bytes: largest message that may come.
    """

    def __init__(
        self, engine: Engine, call: Call, is_draining: Callable[[], bool], message_bytes: int
    ) -> None:
        self._engine = engine
        self._call = call
        self._is_draining = is_draining
        self._message_bytes = message_bytes
        self._receiver = TensorReceiver()
        self._broken: BaseException | None = None

    @property
    def between(self) -> bool:
        """Whether no tensor is open, so that the stream may end here."""
        return self._receiver.between

    def run(self, requests: Requests, at_hand: AtHand = nothing_at_hand) -> Responses:
        """Answers requests until they end.

        Args:
            requests: the messages.
            at_hand: whether the next message has come, so that results may wait while it is taken up.

        Raises:
            FramingError: a message that is not allowed where it came.
            Cancelled, DeadlineExceeded: from the call.
        """
        while (message := self._next(requests)) is not None:
            try:
                event = self._receiver.receive(message)
            except FramingError:
                raise
            except ConvServiceError as exc:
                error = as_error(exc)
                refused(self._engine, self._call, message.header, error)
                error.request_id = self._call.record.request_id
                self._receiver.discard()
                yield exchange.tensor_error(self._receiver.tensor_id, error)
                event = None
            if isinstance(event, Opened):
                yield from self._tensor(event.request, requests, at_hand)
            while not self.between:  # what a failed tensor still had to come
                self._receiver.receive(self._continued(requests))

    def _tensor(self, request: TensorRequest, requests: Requests, at_hand: AtHand) -> Responses:
        passage = Passage(self._engine, request, self._call)
        try:
            with observed(passage):
                for response in self._pass(passage, requests, at_hand):
                    start = self._engine.clock()
                    yield response
                    passage.meter.send.add(start, self._engine.clock())
        except FramingError:
            raise
        except ConvServiceError as exc:
            if exc is self._broken:
                raise
            self._call.check()  # where the whole call was given up, nobody waits for an answer
            self._receiver.discard()
            exc.request_id = self._call.record.request_id
            yield exchange.tensor_error(request.tensor_id, exc)
        else:
            yield exchange.tensor_done(request.tensor_id, passage.report())

    def _pass(self, passage: Passage, requests: Requests, at_hand: AtHand) -> Responses:
        if self._is_draining():
            raise draining()
        self._call.still_allowed()
        number = passage.request.tensor_id
        for result in passage.start(self._packing):
            yield exchange.result_header(number, result)
        while True:
            message = self._continued(requests, passage)
            event = self._receiver.receive(message)
            del message  # not held while the next one is awaited
            if isinstance(event, Aborted):
                raise Cancelled(f"the client aborted tensor {number}", reason=Reason.ABORTED)
            if isinstance(event, Rows | Ended):
                for piece in passage.take(event.bands, at_hand):
                    yield exchange.result_payload(number, *piece)
            if isinstance(event, Ended):
                for piece in passage.finish():
                    yield exchange.result_payload(number, *piece)
                return
            del event

    def _packing(self, plan: SessionPlan) -> Packing:
        """Results as the backend chose; a message that is read beside one taken apart, payloads that fill.

        The plan has one band of the input. Where that is put into another order of axes, its bytes as they
        came, put together from messages, are there beside it.
        """
        buffers = 2 * self._message_bytes + 2 * PAYLOAD_BYTES * len(plan.results)
        if plan.spec.data_format is DataFormat.CHANNELS_LAST:
            buffers += plan.spec.band_bytes
        return Packing(plan.results, buffers)

    def _continued(self, requests: Requests, passage: Passage | None = None) -> pb.ConvolveStreamRequest:
        """The next message, which must come: a tensor is open."""
        message = self._next(requests, passage)
        if message is None:
            raise FramingError(f"the stream ended while tensor {self._receiver.tensor_id} was open")
        return message

    def _next(self, requests: Requests, passage: Passage | None = None) -> pb.ConvolveStreamRequest | None:
        """The next message if there is one; it is waited for no longer than the open tensor's own time."""
        start = self._engine.clock()
        self._call.wait_until = None if passage is None else passage.deadline
        try:
            return next(requests, None)
        except WaitEnded:
            if passage is None:
                raise
            raise passage.overdue() from None
        except Exception as exc:
            self._broken = exc
            raise
        finally:
            if passage is not None:
                passage.meter.receive.add(start, self._engine.clock())
