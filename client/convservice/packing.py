"""Bands to bytes.

`BandPacker` is given arrays of rows, of any height, and hands on the bytes in the order that the contract
fixes, cut into payloads. It holds no more than one band and one payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.bands import PAYLOAD_BYTES, DataFormat, TensorSpec
from convservice.geometry import MAX_SIZE
from convservice.tensors import as_bytes


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
