"""One tensor given and handed out band by band, without I/O: what `stream` is made of.

`BandJob` checks what the user announces; `BandWriter` is given bands of any height and hands on messages;
`BandReader` is given answers and hands on bands, and knows how far they came. Nothing is held but a band
each way, whatever the height.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.arrays import AXES, Options, input_dtype, network_dtype
from convservice.bands import Band, DataFormat, TensorSpec, band_rows_for
from convservice.dtypes import DTypeLike
from convservice.errors import InvalidRequest, Reason, ServiceUnavailable
from convservice.exchange import Done, Failed, ResultOpened, ResultReceiver, TensorSender
from convservice.geometry import MAX_RANK, SampleShape
from convservice.jobs import Output, broken, check_result, tensor_request
from convservice.network import Network
from convservice.packing import BandPacker
from convservice.parameters import integer
from convservice.tensors import as_array
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import TensorReport, TensorRequest, request_from_proto, request_to_proto

STREAM_BAND_BYTES = 64 << 10
"""About the size of a band on the wire when `band_rows` is not given: small, so that rows leave soon."""


@dataclass(frozen=True)
class BandJob:
    """A tensor announced before its rows are there.

    Attributes:
        network: the network.
        request: the tensor's header.
        outputs: what will come back; heights are None when the input's is.
    """

    network: Network
    request: TensorRequest
    outputs: tuple[Output, ...]

    @classmethod
    def of(
        cls,
        network: Network,
        shape: Sequence[int | None],
        dtype: DTypeLike,
        band_rows: int | None,
        options: Options,
    ) -> BandJob:
        """The job for a tensor of `shape`, in the order of axes that the options name.

        Raises:
            InvalidRequest: shape, dtype or `band_rows` break a rule, or the tensor does not fit the network.
        """
        samples, sample = _announced(shape, network.rank, options.data_format)
        known = input_dtype(dtype)
        own = network_dtype(network, known)
        shapes = network.shapes(sample)
        row_bytes = sample.row_elements * known.itemsize
        if band_rows is None:
            rows = band_rows_for(row_bytes, STREAM_BAND_BYTES)
        else:
            rows = integer("band_rows", band_rows, 1)
        if sample.rows is not None:
            rows = min(rows, sample.rows)
        spec = TensorSpec(known, sample, samples, rows, options.data_format)
        request = tensor_request(network, spec, options, tensor_id=1)
        request_from_proto(
            request_to_proto(request)
        )  # the server's own checks of a header, before it is sent
        outputs = tuple(
            Output(name, TensorSpec(options.out_dtype or own, shapes[node], samples, 1, options.data_format))
            for name, node in network.outputs.items()
        )
        return cls(network, request, outputs)

    @property
    def output_bytes(self) -> int | None:
        """Bytes of all results; None while the height is not known."""
        sizes = [output.spec.total_bytes for output in self.outputs]
        return sum(size for size in sizes if size is not None) if None not in sizes else None


class BandWriter:
    """The messages of a band job, as its bands come."""

    def __init__(self, job: BandJob) -> None:
        self._spec = job.request.spec
        self._sender = TensorSender(job.request)
        self._packer = BandPacker(self._spec)
        self._rows = 0

    def header(self) -> pb.ConvolveStreamRequest:
        """The first message."""
        return self._sender.header()

    def add(self, given: Any) -> Iterator[pb.ConvolveStreamRequest]:
        """The messages that the user's next rows complete: every whole band leaves at once.

        Raises:
            InvalidRequest: the rows are not (channels, rows, *rest) of the announced shape and dtype, or are
                more than were announced.
        """
        rows = self._checked(given)
        self._rows += rows.shape[1]
        for data in self._packer.add(rows[None]):
            yield self._sender.payload(data)
        for data in self._packer.flush():
            yield self._sender.payload(data)

    def end(self) -> Iterator[pb.ConvolveStreamRequest]:
        """The last messages.

        Raises:
            InvalidRequest: fewer rows came than were announced.
        """
        total = self._total_rows()
        if total is not None and self._rows < total:
            raise self._wrong_rows(f"the bands ended after {self._rows}")
        for data in self._packer.finish():
            yield self._sender.payload(data)
        yield self._sender.end()

    def _checked(self, given: Any) -> NDArray[Any]:
        array, spec = as_array("a band", given), self._spec
        last = spec.data_format is DataFormat.CHANNELS_LAST
        vector = spec.sample.vector
        if input_dtype(array.dtype) != spec.dtype:
            raise InvalidRequest(
                f"a band has dtype {array.dtype}, the stream was announced with {spec.dtype}",
                reason=Reason.DATA_TYPE_MISMATCH,
                metadata={"band": str(array.dtype), "announced": spec.dtype.name},
                field="bands",
            )
        rows = np.moveaxis(array, -1, 0) if last and array.ndim else array
        fixed = (spec.sample.channels, *spec.sample.rest)
        if rows.ndim != 1 + spec.sample.rank or (*rows.shape[:1], *rows.shape[2:]) != fixed:
            channels, *rest = map(str, fixed)
            if vector:
                wanted = f"({channels},), one vector"
            else:
                wanted = f"({', '.join(['rows', *rest, channels] if last else [channels, 'rows', *rest])})"
            raise InvalidRequest(
                f"a band has shape {array.shape}; it must be {wanted}",
                reason=Reason.INVALID_SHAPE,
                metadata={"shape": str(array.shape)},
                field="bands",
            )
        if vector:
            rows = rows[:, None]
        total = self._total_rows()
        if total is not None and self._rows + rows.shape[1] > total:
            raise self._wrong_rows(f"the bands brought at least {self._rows + rows.shape[1]}")
        return rows

    def _total_rows(self) -> int | None:
        rows = self._spec.sample.rows
        return None if rows is None else rows * self._spec.samples

    def _wrong_rows(self, what: str) -> InvalidRequest:
        spec = self._spec
        return InvalidRequest(
            f"{self._total_rows()} rows were announced ({spec.samples} samples of {spec.sample}), {what}",
            reason=Reason.PAYLOAD_SIZE,
            metadata={"announced": str(self._total_rows()), "rows": str(self._rows)},
            field="bands",
        )


class BandReader:
    """The bands of a band job's results, as its answers come."""

    def __init__(self, job: BandJob, target: str) -> None:
        self._job = job
        self._target = target
        self._receiver = ResultReceiver(job.request, target)
        self._last = {output.name: (0, -1) for output in job.outputs}
        self._vectors = {output.name: output.spec.sample.vector for output in job.outputs}
        self.report: TensorReport | None = None
        """How the tensor went; None until it is complete."""

    def receive(self, message: pb.ConvolveStreamResponse) -> Iterator[Band]:
        """The bands that an answer brings, without the samples axis, in the user's order of axes; a vector as
        (features,).

        Raises:
            ConvServiceError: the tensor failed, or the server broke the protocol.
        """
        try:
            event = self._receiver.receive(message)
            if isinstance(event, ResultOpened):
                index = event.result.index
                expected = self._job.outputs[index] if index < len(self._job.outputs) else None
                check_result(event.result, expected, self._target)
            elif not isinstance(event, Failed):
                for band in event.bands:
                    yield from self._samples(band)
                if isinstance(event, Done):
                    self.report = event.report
        except InvalidRequest as exc:  # what the client finds wrong in an answer is the server's fault
            raise broken(exc.message, self._target) from exc
        if isinstance(event, Failed):
            raise event.error

    def interrupted(self, error: ServiceUnavailable) -> ServiceUnavailable:
        """The error of a connection that was lost, with how far the results had come.

        `metadata["sample"]` and `metadata["last_row"]` are the last row delivered, -1 for none; with
        several outputs there is one pair for each, as `sample.NAME` and `last_row.NAME`.
        """
        for name, (sample, row) in self._last.items():
            suffix = f".{name}" if len(self._last) > 1 else ""
            error.metadata[f"sample{suffix}"] = str(sample)
            error.metadata[f"last_row{suffix}"] = str(row)
        return error

    def _samples(self, band: Band) -> Iterator[Band]:
        last = self._job.request.spec.data_format is DataFormat.CHANNELS_LAST
        for at, array in enumerate(band.array):
            sample = band.sample + at
            self._last[band.output] = (sample, band.first_row + array.shape[1] - 1)
            if self._vectors[band.output]:
                array = array[:, 0]
            yield replace(band, array=np.moveaxis(array, 0, -1) if last else array, sample=sample)


def _announced(
    shape: Sequence[int | None], rank: int | None, data_format: DataFormat
) -> tuple[int, SampleShape]:
    """Samples and sample shape of an announced (C, H, W), (N, C, H, W) or the like, where H may be None, or
    of vectors (F,) or (N, F)."""
    sizes = list(shape)
    spatial = len(sizes) - 1 if rank is None else rank
    if not 0 <= spatial <= MAX_RANK or len(sizes) not in (spatial + 1, spatial + 2):
        axes = "*spatial" if rank is None else AXES.get(rank, "")
        wanted = f"({axes}, C)" if data_format is DataFormat.CHANNELS_LAST else f"(C, {axes})"
        wanted = "(F,)" if rank == 0 else wanted
        raise InvalidRequest(
            f"shape has {len(sizes)} sizes, {tuple(sizes)}; it must be {wanted},"
            " or the same with the number of samples first",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(tuple(sizes))},
            field="shape",
        )
    samples = integer("shape", sizes.pop(0), 1) if len(sizes) == spatial + 2 else 1
    if data_format is DataFormat.CHANNELS_LAST:
        sizes.insert(0, sizes.pop())
    channels, *spatial_sizes = sizes
    if not spatial_sizes:
        return samples, SampleShape.of_vector(integer("shape", channels, 1))
    rows, *rest = spatial_sizes
    height = None if rows is None else integer("shape", rows, 1)
    sample = SampleShape(integer("shape", channels, 1), height, tuple(integer("shape", s, 1) for s in rest))
    return samples, sample
