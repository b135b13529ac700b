"""One call's work without I/O: what is sent for a tensor, and how its results are put together.

Given a network, a checked input and options, `Job` knows the sizes of everything beforehand and hands on
the messages to send; `Collector` is given the answers and hands on the results. The sync and the async
client both run on these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.arrays import Input, Options, network_dtype, result_shapes
from convservice.bands import PAYLOAD_BYTES, Band, DataFormat, TensorSpec, band_rows_for
from convservice.errors import InternalError, InvalidRequest, Reason
from convservice.exchange import Done, Failed, ResultOpened, ResultReceiver, TensorSender
from convservice.geometry import SampleShape
from convservice.network import Network
from convservice.packing import BandPacker
from convservice.unpacking import BandUnpacker
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import (
    ResultSpec,
    TensorReport,
    TensorRequest,
    report_from_proto,
    request_to_proto,
    result_from_proto,
)
from convservice.wire.networks import inline_to_proto

UNARY_BYTES = 1 << 20
"""Input and all outputs up to this size together go by one unary call, larger ones by a stream."""

INLINE_BYTES = 1 << 20
"""Weights up to this size travel inline."""

BAND_BYTES = 256 << 10
"""About the size of a band when the client sends a whole array."""

SLICE_BYTES = 8 << 20
"""About how much of an array is put in the wire's order at once."""


@dataclass(frozen=True)
class Output:
    """One output as geometry foretells it."""

    name: str
    spec: TensorSpec


@dataclass(frozen=True)
class Job:
    """One array to be sent through one network.

    Attributes:
        network: the network, with its weights where they are known here.
        request: the tensor's header.
        array: (samples, channels, rows, *rest), a view of the user's array.
        outputs: what will come back, in the network's order.
        batched: whether the results have an axis of samples.
        bare: whether the results have spatial axes alone.
    """

    network: Network
    request: TensorRequest
    array: NDArray[Any]
    outputs: tuple[Output, ...]
    batched: bool
    bare: bool

    @classmethod
    def of(cls, network: Network, given: Input, options: Options, tensor_id: int = 0) -> Job:
        """The job for an input.

        Raises:
            InvalidRequest: the input does not fit the network.
        """
        samples = given.array.shape[0]
        sample = given.sample
        itemsize = given.dtype.itemsize
        small = sample.elements * itemsize <= PAYLOAD_BYTES
        rows = sample.height if small else band_rows_for(sample.row_elements * itemsize, BAND_BYTES)
        spec = TensorSpec(given.dtype, sample, samples, min(rows, sample.height), options.data_format)
        own = network_dtype(network, given.dtype)
        outputs = tuple(
            Output(
                name, TensorSpec(options.out_dtype or own, shape, samples, shape.height, options.data_format)
            )
            for name, shape in result_shapes(network, given, options.data_format).items()
        )
        request = tensor_request(network, spec, options, tensor_id)
        return cls(network, request, given.array, outputs, given.batched, given.bare)

    @property
    def input_bytes(self) -> int:
        """Bytes of the input."""
        return self.request.spec.total_bytes or 0

    @property
    def output_bytes(self) -> int:
        """Bytes of all results."""
        return sum(output.spec.total_bytes or 0 for output in self.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of input and results together."""
        return self.input_bytes + self.output_bytes

    @property
    def small(self) -> bool:
        """Whether it goes by the unary call."""
        return self.nbytes <= UNARY_BYTES

    def unary_request(self, inline: bool) -> pb.ConvolveRequest:
        """The whole job in one message, with the network and its weights if `inline`."""
        return pb.ConvolveRequest(
            header=request_to_proto(self.request),
            network=inline_to_proto(self.network) if inline else None,
            data=b"".join(self._payloads()),
        )

    def messages(self) -> Iterator[pb.ConvolveStreamRequest]:
        """The job as messages of a stream, header to end."""
        sender = TensorSender(self.request)
        yield sender.header()
        for data in self._payloads():
            yield sender.payload(data)
        yield sender.end()

    def _payloads(self) -> Iterator[bytes]:
        packer = BandPacker(self.request.spec)
        for part in self._slices():
            yield from packer.add(part)
        yield from packer.finish()

    def _slices(self) -> Iterator[NDArray[Any]]:
        """The array in parts of about `SLICE_BYTES`: several whole samples, or whole bands of one."""
        spec = self.request.spec
        height = self.array.shape[2]
        if height * spec.row_bytes <= SLICE_BYTES:
            step = max(1, SLICE_BYTES // (height * spec.row_bytes))
            for first in range(0, self.array.shape[0], step):
                yield self.array[first : first + step]
            return
        rows = spec.band_rows * max(1, SLICE_BYTES // spec.band_bytes)
        for sample in range(self.array.shape[0]):
            for row in range(0, height, rows):
                yield self.array[sample : sample + 1, :, row : row + rows]


def tensor_request(network: Network, spec: TensorSpec, options: Options, tensor_id: int) -> TensorRequest:
    """A tensor's header from a call's options; a time-out travels in whole milliseconds, at least 1."""
    timeout_ms = 0 if options.timeout is None else max(1, round(options.timeout * 1e3))
    return TensorRequest(
        network=network.name,
        spec=spec,
        out_dtype=options.out_dtype,
        backend=options.backend,
        precision=options.precision,
        timeout_ms=timeout_ms,
        tensor_id=tensor_id,
    )


class Collector:
    """Puts the results of one job together.

    Args:
        job: the job.
        target: the server, for errors.
    """

    def __init__(self, job: Job, target: str) -> None:
        self._job = job
        self._target = target
        self._receiver = ResultReceiver(job.request, target)
        self._arrays: dict[str, NDArray[Any]] = {}
        self.report: TensorReport | None = None
        """How the tensor went; None until it is complete."""

    def receive(self, message: pb.ConvolveStreamResponse) -> bool:
        """Takes the next answer of the stream; true when it was the job's last.

        Raises:
            ConvServiceError: the tensor failed, or the server broke the protocol.
        """
        try:
            event = self._receiver.receive(message)
            if isinstance(event, ResultOpened):
                self._open(event.result)
            elif not isinstance(event, Failed):
                for band in event.bands:
                    self._place(band)
                if isinstance(event, Done):
                    self._finish(event.report)
        except InvalidRequest as exc:  # what the client finds wrong in an answer is the server's fault
            raise broken(exc.message, self._target) from exc
        if isinstance(event, Failed):
            raise event.error
        return self.report is not None

    def receive_all(self, response: pb.ConvolveResponse) -> None:
        """Takes the answer of the unary call.

        Raises:
            InternalError: it is not what geometry demands.
        """
        if len(response.data) != len(response.results):
            raise broken(
                f"{len(response.results)} results came with {len(response.data)} payloads", self._target
            )
        try:
            for header, data in zip(response.results, response.data, strict=True):
                result = result_from_proto(header, self._job.request.spec.data_format)
                self._open(result)
                unpacker = BandUnpacker(result.spec, result.name)
                for band in unpacker.feed(0, data):
                    self._place(band)
                for band in unpacker.finish():
                    self._place(band)
        except InvalidRequest as exc:
            raise broken(exc.message, self._target) from exc
        self._finish(report_from_proto(response.done))

    def result(self) -> Any:
        """The result in the rank and axis order of the user's input; a dict where there are several."""
        found = {
            output.name: self._shaped(self._arrays[output.name], output.spec.sample)
            for output in self._job.outputs
        }
        return found if len(found) > 1 else next(iter(found.values()))

    def _open(self, result: ResultSpec) -> None:
        expected = self._job.outputs[result.index] if result.index < len(self._job.outputs) else None
        check_result(result, expected, self._target)
        spec = result.spec
        height, rest = spec.sample.height, spec.sample.rest
        if spec.data_format is DataFormat.CHANNELS_LAST:
            shape: tuple[int, ...] = (spec.samples, height, *rest, spec.sample.channels)
        else:
            shape = (spec.samples, spec.sample.channels, height, *rest)
        self._arrays[result.name] = np.empty(shape, dtype=spec.dtype.numpy)

    def _place(self, band: Band) -> None:
        array = self._arrays[band.output]
        if self._job.request.spec.data_format is DataFormat.CHANNELS_LAST:
            array = np.moveaxis(array, -1, 1)
        samples, _, rows = band.array.shape[:3]
        array[band.sample : band.sample + samples, :, band.first_row : band.first_row + rows] = band.array

    def _finish(self, report: TensorReport) -> None:
        if len(self._arrays) != len(self._job.outputs):
            raise broken(
                f"{len(self._arrays)} of {len(self._job.outputs)} outputs were announced", self._target
            )
        self.report = report

    def _shaped(self, array: NDArray[Any], sample: SampleShape) -> NDArray[Any]:
        if sample.vector:
            array = array.reshape(len(array), sample.channels)
        lead = 2 if self._job.bare else 0 if self._job.batched else 1
        return array.reshape(array.shape[lead:])


def check_result(result: ResultSpec, expected: Output | None, target: str) -> None:
    """Refuses an announced output that is not what geometry demands, before anything is allocated.

    Raises:
        InternalError: name, dtype, shape or number of samples differ.
    """
    told = _described(result.name, result.spec)
    if expected is None:
        raise broken(f"output {result.index} was announced as {told}; the network has no such output", target)
    wanted = _described(expected.name, expected.spec)
    if told != wanted:
        raise broken(f"output {result.index} was announced as {told}; it must be {wanted}", target)


def _described(name: str, spec: TensorSpec) -> str:
    return f"{name!r}, {spec.samples} samples of {spec.sample} {spec.dtype}"


def broken(what: str, target: str) -> InternalError:
    """An answer that the contract does not allow."""
    return InternalError(f"the server broke the protocol: {what}", reason=Reason.FRAMING, target=target)
