"""Bands to bytes and back.

A tensor travels as bands: consecutive rows of one sample, or several whole samples. `BandPacker` is given
arrays of rows, of any height, and hands on the bytes in the order the contract fixes, cut into payloads;
`BandUnpacker` is given payloads, cut anywhere, and hands on bands. Neither holds more than one band and
one payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_SIZE, SampleShape
from convservice.tensors import as_bytes

PAYLOAD_BYTES = 1 << 20
"""Bytes of tensor in one message: large enough to be cheap, small enough for every default limit."""


class DataFormat(StrEnum):
    """The order of a sample's axes where users hold it, and on the wire."""

    CHANNELS_FIRST = "channels_first"
    CHANNELS_LAST = "channels_last"


@dataclass(frozen=True)
class Band:
    """Consecutive rows of one sample, or several whole samples.

    Attributes:
        array: (samples, channels, rows, *rest); what the SDK's `stream` hands out has no samples axis.
        sample: index of the (first) sample in its tensor.
        first_row: index of the first row in the sample.
        output: name of the output it belongs to; empty for input.
    """

    array: NDArray[Any]
    sample: int = 0
    first_row: int = 0
    output: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor on the wire is.

    Attributes:
        dtype: of its elements.
        sample: the shape of each sample, channels first; rows None while the height is not known.
        samples: how many.
        band_rows: rows in each band of its bytes; the last band of a sample may have fewer.
        data_format: order of axes within a band.
    """

    dtype: DType
    sample: SampleShape
    samples: int
    band_rows: int
    data_format: DataFormat = DataFormat.CHANNELS_FIRST

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all channels."""
        return self.sample.row_elements * self.dtype.itemsize

    @property
    def band_bytes(self) -> int:
        """Bytes of the largest band."""
        rows = self.band_rows if self.sample.rows is None else min(self.band_rows, self.sample.rows)
        return rows * self.row_bytes

    @property
    def total_bytes(self) -> int | None:
        """Bytes of the whole tensor; None while the height is not known."""
        return None if self.sample.rows is None else self.samples * self.sample.rows * self.row_bytes

    def packed_shape(self, rows: int) -> tuple[int, ...]:
        """The shape of a band of `rows` rows as its bytes lie."""
        if self.data_format is DataFormat.CHANNELS_LAST:
            return (rows, *self.sample.rest, self.sample.channels)
        return (self.sample.channels, rows, *self.sample.rest)


def band_rows_for(row_bytes: int, target_bytes: int) -> int:
    """Rows in a band of about `target_bytes`, at least 1."""
    return max(1, target_bytes // max(1, row_bytes))


class BandPacker:
    """Turns rows into the bytes of a tensor, in payloads of `payload_bytes`.

    Rows come in order, sample after sample, in arrays of any height; `add` and `flush` hand back whatever
    payloads are ready.
    """

    def __init__(self, spec: TensorSpec, payload_bytes: int = PAYLOAD_BYTES) -> None:
        self._spec = spec
        self._payload_bytes = payload_bytes
        self._ready = bytearray()
        self._waiting: list[NDArray[Any]] = []
        self._waiting_rows = 0
        self._rows_done = 0

    def add(self, array: NDArray[Any]) -> Iterator[bytes]:
        """Takes rows (samples, channels, rows, *rest), of several samples only if each is whole."""
        rows = self._spec.sample.rows
        if array.shape[0] > 1 or (array.shape[2] == rows and not self._waiting and not self._rows_done):
            for sample in self._whole_samples(array):
                yield from self._emit(sample)
            return
        at, count = 0, array.shape[2]
        while at < count:
            left = MAX_SIZE if rows is None else rows - self._rows_done - self._waiting_rows
            take = min(count - at, left, self._spec.band_rows - self._waiting_rows)
            if not self._waiting and take == self._spec.band_rows:
                take = (min(count - at, left) // take) * take  # as many whole bands as are here
            self._waiting.append(array[0, :, at : at + take])
            self._waiting_rows += take
            at += take
            if self._waiting_rows >= self._spec.band_rows or take == left:
                yield from self._emit_waiting()
        if self._waiting:  # the caller may fill the same array with its next rows
            self._waiting[-1] = self._waiting[-1].copy()

    def flush(self) -> Iterator[bytes]:
        """Hands back the bytes of whole bands that fill no payload yet."""
        if self._ready:
            ready, self._ready = bytes(self._ready), bytearray()
            yield ready

    def finish(self) -> Iterator[bytes]:
        """Ends the tensor: what is left, a last band shorter than the others included."""
        if self._waiting:
            yield from self._emit_waiting()
        yield from self.flush()

    def _whole_samples(self, array: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Whole samples as packed arrays, all at once where a sample is one band."""
        rows = array.shape[2]
        if rows <= self._spec.band_rows:
            yield self._packed(array)
            return
        for sample in array:
            whole = rows - rows % self._spec.band_rows
            yield self._banded(sample[:, :whole])
            if whole < rows:
                yield self._packed(sample[None, :, whole:])

    def _emit_waiting(self) -> Iterator[bytes]:
        rows = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting, axis=1)
        count, step = rows.shape[1], self._spec.band_rows
        self._waiting, self._waiting_rows = [], 0
        self._rows_done += count
        if self._rows_done == self._spec.sample.rows:
            self._rows_done = 0
        if count > step:
            whole = count - count % step
            yield from self._emit(self._banded(rows[:, :whole]))
            rows = rows[:, whole:]
        if rows.shape[1]:
            yield from self._emit(self._packed(rows[None]))

    def _banded(self, rows: NDArray[Any]) -> NDArray[Any]:
        """(channels, n * band_rows, *rest) as the packed array of n bands."""
        channels, count, *rest = rows.shape
        step = self._spec.band_rows
        return self._packed(np.moveaxis(rows.reshape(channels, count // step, step, *rest), 1, 0))

    def _packed(self, bands: NDArray[Any]) -> NDArray[Any]:
        """(bands, channels, rows, *rest) in the wire's order of axes and bytes."""
        if self._spec.data_format is DataFormat.CHANNELS_LAST:
            bands = np.moveaxis(bands, 1, -1)
        return np.ascontiguousarray(bands, dtype=self._spec.dtype.packed)

    def _emit(self, packed: NDArray[Any]) -> Iterator[bytes]:
        data, size = as_bytes(packed), self._payload_bytes
        at = 0
        if self._ready:
            at = min(len(data), size - len(self._ready))
            self._ready += data[:at]
            if len(self._ready) == size:
                yield from self.flush()
        while len(data) - at >= size:
            yield bytes(data[at : at + size])
            at += size
        self._ready += data[at:]


class BandUnpacker:
    """Turns payloads into bands.

    Bands come out as soon as their bytes are there: all whole bands of a payload that belong to one sample
    as one array, or all whole samples where a sample is one band.
    """

    def __init__(self, spec: TensorSpec, output: str = "") -> None:
        self._spec = spec
        self._output = output
        self._offset = 0
        self._sample = 0
        self._row = 0
        self._partial: NDArray[np.uint8] | None = None
        self._filled = 0

    @property
    def offset(self) -> int:
        """Bytes taken so far."""
        return self._offset

    @property
    def rows(self) -> int:
        """Whole rows handed on so far, over all samples."""
        return self._sample * (self._spec.sample.rows or 0) + self._row

    def feed(self, offset: int, data: bytes) -> Iterator[Band]:
        """Takes the next payload.

        Raises:
            InvalidRequest: `PAYLOAD_OFFSET` when bytes are missing or repeated, `PAYLOAD_SIZE` when there
                are more than the tensor has.
        """
        if offset != self._offset:
            raise InvalidRequest(
                f"a payload must begin where the one before ended: byte {self._offset}, not {offset}",
                reason=Reason.PAYLOAD_OFFSET,
                metadata={"expected": str(self._offset), "offset": str(offset)},
                field="byte_offset",
            )
        total = self._spec.total_bytes
        if total is not None and offset + len(data) > total:
            raise _wrong_size(self._spec, offset + len(data), "at least ")
        self._offset += len(data)
        return self._bands(memoryview(data))

    def finish(self) -> Iterator[Band]:
        """Ends the tensor; hands on the last rows where the height was not known.

        Raises:
            InvalidRequest: `PAYLOAD_SIZE` when bytes are missing, or the last row is not whole.
        """
        total = self._spec.total_bytes
        if total is not None and self._offset != total:
            raise _wrong_size(self._spec, self._offset, "")
        if self._partial is None or not self._filled:
            return
        rows, odd = divmod(self._filled, self._spec.row_bytes)
        if odd:
            raise InvalidRequest(
                f"the tensor ended within a row: {self._offset} bytes are no multiple of"
                f" {self._spec.row_bytes}, the bytes of a row",
                reason=Reason.PAYLOAD_SIZE,
                metadata={"bytes": str(self._offset), "row_bytes": str(self._spec.row_bytes)},
                field="data",
            )
        yield self._decode(self._partial[: self._filled], 1, rows, owned=True)

    def _bands(self, data: memoryview) -> Iterator[Band]:
        while len(data):
            band_rows = self._next_band_rows()
            size = band_rows * self._spec.row_bytes
            if self._partial is None and len(data) >= size:
                count = min(len(data) // size, self._bands_alike(band_rows))
                used = np.frombuffer(data[: count * size], dtype=np.uint8)
                data = data[count * size :]
                yield self._decode(used, count, band_rows)
                continue
            if self._partial is None:
                self._partial = np.empty(size, dtype=np.uint8)
                self._filled = 0
            take = min(len(data), size - self._filled)
            self._partial[self._filled : self._filled + take] = np.frombuffer(data[:take], dtype=np.uint8)
            self._filled += take
            data = data[take:]
            if self._filled == size:
                whole, self._partial = self._partial, None
                yield self._decode(whole, 1, band_rows, owned=True)

    def _next_band_rows(self) -> int:
        rows = self._spec.sample.rows
        return self._spec.band_rows if rows is None else min(self._spec.band_rows, rows - self._row)

    def _bands_alike(self, band_rows: int) -> int:
        """How many bands of this many rows follow before the sample ends, or samples of one band."""
        rows = self._spec.sample.rows
        if rows is None:
            return 1 << 62
        if band_rows == rows:
            return self._spec.samples - self._sample
        return (rows - self._row) // band_rows

    def _decode(self, data: NDArray[np.uint8], count: int, band_rows: int, *, owned: bool = False) -> Band:
        """The bands that packed bytes hold; the array is made of `data` itself where that is `owned`."""
        spec = self._spec
        packed: NDArray[Any] = data.view(spec.dtype.packed).reshape(count, *spec.packed_shape(band_rows))
        if spec.data_format is DataFormat.CHANNELS_LAST:
            packed = np.moveaxis(packed, -1, 1)
        if band_rows == spec.sample.rows:
            band = Band(_aligned(packed, spec.dtype, owned), self._sample, 0, self._output)
            self._sample += count
            return band
        if count == 1:
            joined = _aligned(packed, spec.dtype, owned)
        else:
            shape = (1, spec.sample.channels, count * band_rows, *spec.sample.rest)
            joined = np.empty(shape, dtype=spec.dtype.numpy)
            parts = joined.reshape(spec.sample.channels, count, band_rows, *spec.sample.rest)
            parts[...] = np.moveaxis(packed, 0, 1)
        band = Band(joined, self._sample, self._row, self._output)
        self._row += count * band_rows
        if self._row == spec.sample.rows:
            self._row = 0
            self._sample += 1
        return band


def _aligned(packed: NDArray[Any], dtype: DType, owned: bool) -> NDArray[Any]:
    """A native, aligned, C-contiguous array: received bytes lie anywhere, and arithmetic on them is slow.

    What the unpacker put together itself is aligned, and copied only where its order is another.
    """
    if owned and packed.flags.c_contiguous:
        return packed.astype(dtype.numpy, copy=False)
    return np.array(packed, dtype=dtype.numpy, order="C", copy=True)


def _wrong_size(spec: TensorSpec, got: int, more: str) -> InvalidRequest:
    return InvalidRequest(
        f"the tensor has {spec.total_bytes} bytes ({spec.samples} samples of {spec.sample} {spec.dtype}),"
        f" {more}{got} were sent",
        reason=Reason.PAYLOAD_SIZE,
        metadata={"expected": str(spec.total_bytes), "bytes": str(got)},
        field="data",
    )
