"""Bytes to bands.

`BandUnpacker` is given payloads, cut anywhere, and hands on bands as soon as their bytes are there. It holds
no more than one band.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.bands import Band, DataFormat, TensorSpec
from convservice.dtypes import DType
from convservice.errors import InvalidRequest, Reason


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
