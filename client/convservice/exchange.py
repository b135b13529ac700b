"""The stream's protocol as state machines without I/O.

The server's side is given request messages and hands on what they mean (`TensorReceiver`); the client's
side is given tensors and hands on request messages (`TensorSender`), and is given response messages and
hands on what they mean (`ResultReceiver`). The same three serve the sync client, the async client and the
server, and are tested with no network at all.

Rules: tensors follow one another and never interleave; ids strictly increase; a tensor that failed is
discarded until its End or Abort and the stream goes on; only a framing error ends the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from google.rpc import status_pb2

from convservice.bands import Band
from convservice.errors import (
    ConvServiceError,
    InternalError,
    InvalidRequest,
    Reason,
    from_status,
    to_status,
)
from convservice.unpacking import BandUnpacker
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import (
    ResultSpec,
    TensorReport,
    TensorRequest,
    report_from_proto,
    report_to_proto,
    request_from_proto,
    request_to_proto,
    result_from_proto,
    result_to_proto,
)


class FramingError(InvalidRequest):
    """A message that the protocol does not allow here; it ends the stream."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.FRAMING)


@dataclass(frozen=True)
class Opened:
    """A tensor's header came."""

    request: TensorRequest


@dataclass(frozen=True)
class Rows:
    """Bands of the open tensor came; they are decoded as they are iterated."""

    bands: Iterator[Band]


@dataclass(frozen=True)
class Ended:
    """All bytes of the open tensor have come; `bands` are the last ones of an unannounced height."""

    bands: Iterator[Band]
    rows: int


@dataclass(frozen=True)
class Aborted:
    """The client gave the open tensor up."""


Event = Opened | Rows | Ended | Aborted


class _State(Enum):
    BETWEEN = auto()
    OPEN = auto()
    DISCARDING = auto()


class TensorReceiver:
    """The server's reading side of one stream."""

    def __init__(self) -> None:
        self._state = _State.BETWEEN
        self._unpacker: BandUnpacker | None = None
        self.tensor_id = -1
        """Id of the tensor that the last header opened."""

    @property
    def between(self) -> bool:
        """Whether no tensor is open: the stream may end here."""
        return self._state is _State.BETWEEN

    def receive(self, message: pb.ConvolveStreamRequest) -> Event | None:
        """What a message means; None for what belongs to a tensor that failed.

        Raises:
            FramingError: the message is not allowed here; the stream must end.
            InvalidRequest: the open tensor is at fault; call `discard`, answer, and go on.
        """
        kind = message.WhichOneof("message")
        if kind == "header":
            return self._header(message.header)
        if kind == "payload":
            return self._payload(message.payload)
        if kind in ("end", "abort"):
            return self._close(kind, message.end.tensor_id if kind == "end" else message.abort.tensor_id)
        raise FramingError(
            "a message of the stream holds a header, a payload, an end or an abort; this has none"
        )

    def discard(self) -> None:
        """Marks the open tensor as failed: what follows of it is dropped."""
        if self._state is _State.OPEN:
            self._state = _State.DISCARDING
        self._unpacker = None

    def _header(self, header: pb.TensorHeader) -> Event:
        if self._state is not _State.BETWEEN:
            raise FramingError(
                f"tensor {header.tensor_id} was opened before tensor {self.tensor_id} ended or was aborted"
            )
        if header.tensor_id <= self.tensor_id:
            raise FramingError(f"tensor ids must increase: {header.tensor_id} came after {self.tensor_id}")
        self.tensor_id = header.tensor_id
        self._state = _State.OPEN
        request = request_from_proto(header)
        if not header.band_rows:
            raise InvalidRequest(
                "band_rows must be at least 1 in a stream, not 0",
                reason=Reason.INVALID_PARAMETER,
                metadata={"name": "band_rows", "value": "0"},
                field="band_rows",
            )
        self._unpacker = BandUnpacker(request.spec)
        return Opened(request)

    def _payload(self, payload: pb.Payload) -> Event | None:
        self._check_open("payload", payload.tensor_id)
        if self._unpacker is None:
            return None
        return Rows(self._unpacker.feed(payload.byte_offset, payload.data))

    def _close(self, kind: str, tensor_id: int) -> Event | None:
        self._check_open(kind, tensor_id)
        unpacker, self._unpacker = self._unpacker, None
        self._state = _State.BETWEEN
        if unpacker is None:
            return None
        if kind == "abort":
            return Aborted()
        bands = list(unpacker.finish())
        return Ended(iter(bands), unpacker.rows)

    def _check_open(self, kind: str, tensor_id: int) -> None:
        if self._state is _State.BETWEEN or tensor_id != self.tensor_id:
            state = "none is open" if self._state is _State.BETWEEN else f"{self.tensor_id} is open"
            raise FramingError(f"{kind} came for tensor {tensor_id}, but {state}")


class TensorSender:
    """The client's writing side of one tensor in a stream: its messages, in order."""

    def __init__(self, request: TensorRequest) -> None:
        self.request = request
        self._offset = 0

    def header(self) -> pb.ConvolveStreamRequest:
        """The first message."""
        return pb.ConvolveStreamRequest(header=request_to_proto(self.request))

    def payload(self, data: bytes) -> pb.ConvolveStreamRequest:
        """The next piece of the tensor's bytes."""
        offset, self._offset = self._offset, self._offset + len(data)
        payload = pb.Payload(tensor_id=self.request.tensor_id, byte_offset=offset, data=data)
        return pb.ConvolveStreamRequest(payload=payload)

    def end(self) -> pb.ConvolveStreamRequest:
        """The last message of a tensor that was sent whole."""
        return pb.ConvolveStreamRequest(end=pb.End(tensor_id=self.request.tensor_id))

    def abort(self) -> pb.ConvolveStreamRequest:
        """The last message of a tensor that is given up."""
        return pb.ConvolveStreamRequest(abort=pb.Abort(tensor_id=self.request.tensor_id))


@dataclass(frozen=True)
class ResultOpened:
    """The server announced an output."""

    result: ResultSpec


@dataclass(frozen=True)
class ResultRows:
    """Bands of an output came."""

    bands: Iterator[Band]


@dataclass(frozen=True)
class Done:
    """The tensor is complete; `bands` are the last ones of an unannounced height."""

    report: TensorReport
    bands: Iterator[Band]


@dataclass(frozen=True)
class Failed:
    """The tensor failed; the stream goes on."""

    error: ConvServiceError


ResultEvent = ResultOpened | ResultRows | Done | Failed


class ResultReceiver:
    """The client's reading side of one tensor in a stream.

    Args:
        request: the tensor whose results are read.
        target: the server, for errors.
    """

    def __init__(self, request: TensorRequest, target: str | None = None) -> None:
        self._request = request
        self._target = target
        self._unpackers: list[BandUnpacker] = []

    def receive(self, message: pb.ConvolveStreamResponse) -> ResultEvent:
        """What a message means.

        Raises:
            InternalError: the server broke the protocol.
        """
        try:
            return self._event(message)
        except InvalidRequest as exc:
            raise self._broken(exc.message) from exc

    def _event(self, message: pb.ConvolveStreamResponse) -> ResultEvent:
        kind = message.WhichOneof("message")
        part = None if kind is None else getattr(message, kind)
        if part is None or part.tensor_id != self._request.tensor_id:
            got = "no known message" if part is None else f"a {kind} of tensor {part.tensor_id}"
            raise self._broken(f"tensor {self._request.tensor_id} was awaited, {got} came")
        if isinstance(part, pb.ResultHeader):
            return self._header(part)
        if isinstance(part, pb.ResultPayload):
            if part.output >= len(self._unpackers):
                raise self._broken(f"a payload of output {part.output} came before its header")
            return ResultRows(self._unpackers[part.output].feed(part.byte_offset, part.data))
        if isinstance(part, pb.TensorDone):
            last = [band for unpacker in self._unpackers for band in unpacker.finish()]
            return Done(report_from_proto(part), iter(last))
        status = status_pb2.Status(code=part.code, message=part.message, details=part.details)
        return Failed(from_status(status, target=self._target, method="ConvolveStream"))

    def _header(self, header: pb.ResultHeader) -> ResultOpened:
        if header.output != len(self._unpackers):
            raise self._broken(f"output {header.output} was announced after {len(self._unpackers)} others")
        result = result_from_proto(header, self._request.spec.data_format)
        self._unpackers.append(BandUnpacker(result.spec, result.name))
        return ResultOpened(result)

    def _broken(self, what: str) -> InternalError:
        return InternalError(
            f"the server broke the protocol: {what}",
            reason=Reason.FRAMING,
            target=self._target,
            method="ConvolveStream",
        )


def result_header(tensor_id: int, result: ResultSpec) -> pb.ConvolveStreamResponse:
    """The message that announces an output."""
    return pb.ConvolveStreamResponse(header=result_to_proto(tensor_id, result))


def result_payload(tensor_id: int, output: int, offset: int, data: bytes) -> pb.ConvolveStreamResponse:
    """The next piece of an output's bytes."""
    payload = pb.ResultPayload(tensor_id=tensor_id, output=output, byte_offset=offset, data=data)
    return pb.ConvolveStreamResponse(payload=payload)


def tensor_done(tensor_id: int, report: TensorReport) -> pb.ConvolveStreamResponse:
    """The message that closes a tensor that succeeded."""
    return pb.ConvolveStreamResponse(done=report_to_proto(tensor_id, report))


def tensor_error(tensor_id: int, error: ConvServiceError) -> pb.ConvolveStreamResponse:
    """The message that closes a tensor that failed."""
    status = to_status(error)
    failed = pb.TensorError(
        tensor_id=tensor_id, code=status.code, message=status.message, details=status.details
    )
    return pb.ConvolveStreamResponse(error=failed)
