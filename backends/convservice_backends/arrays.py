"""What stages and sessions ask a backend's arrays for.

Rows held, runs of output and samples being collected are the backend's own arrays, `(samples, channels, rows,
*rest)`; slices along the first three axes are views. Everything else that is done with them is here.
"""

from __future__ import annotations

from typing import Any, Protocol

from convservice.dtypes import DType


class Arrays(Protocol):
    """A backend's arrays."""

    @property
    def moved_bytes(self) -> int:
        """Bytes worth moving at a time, by one `copy`."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """A new C-contiguous array of any content."""
        ...

    def copy(self, source: Any, target: Any) -> None:
        """Fills `target` with `source`, of the same shape, each element rounded to its dtype."""
        ...

    def convert(self, array: Any, dtype: DType) -> Any:
        """The array rounded to a dtype; the array itself where it has that dtype."""
        ...
