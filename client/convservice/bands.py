"""Bands: what flows.

A tensor travels as bands: consecutive rows of one sample, or several whole samples. Here is what a band is,
and what is said of a tensor so that its bytes can be cut into bands: `packing` turns bands into bytes,
`unpacking` bytes into bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.geometry import SampleShape

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
        array: (samples, channels, rows, *rest); what the SDK's `stream` hands out has no samples axis, and a
            vector there is (features,).
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
