"""Device memory, emulated: bytes of the host that are NaN until written and whose ends are watched.

A `Block` is the bytes; `EmulatedMemory` is somebody's hold on it. When the hold goes, the block is free for
the next allocation on its stream at once, although work that was asked for before may still use it: that is
what a memory pool of a GPU does, and what makes a forgotten wait show.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable

import numpy as np

from convservice_backends.cuda.device import Bytes

ALIGNMENT = 256
GUARD = 256
"""Bytes on either side of a block that no kernel may touch."""

POISON = 0xFF
"""Of every byte: NaN in each float type."""


class Block:
    """Bytes at a multiple of `ALIGNMENT`, between guards; all poison at first.

    Args:
        nbytes: its size.
    """

    def __init__(self, nbytes: int) -> None:
        # Pages of their own: aligned to far more than ALIGNMENT, and not counted among the host's memory.
        whole = np.frombuffer(mmap.mmap(-1, nbytes + 2 * GUARD), np.uint8)
        whole.fill(POISON)
        start = GUARD
        self.data: Bytes = whole[start : start + nbytes]
        self._before = whole[start - GUARD : start]
        self._behind = whole[start + nbytes : start + nbytes + GUARD]

    @property
    def address(self) -> int:
        """Of the first byte."""
        return self.data.ctypes.data

    @property
    def nbytes(self) -> int:
        """Its size, without the guards."""
        return self.data.nbytes

    def trespass(self) -> str:
        """What has been written beside it; empty where nothing has."""
        for guard, where in ((self._before, "before"), (self._behind, "behind")):
            touched = np.flatnonzero(guard != POISON)
            if touched.size:
                far = GUARD - int(touched[-1]) if where == "before" else int(touched[0]) + 1
                return f"byte {far} {where} a memory of {self.nbytes} bytes was written"
        return ""


class EmulatedMemory:
    """A hold on device memory; see `cuda.device.Memory`.

    Args:
        block: where it is.
        nbytes: how much of the block.
        stream: the stream that it was allocated on.
        give_back: called with the block and the size when the last reference is gone.
    """

    def __init__(
        self, block: Block, nbytes: int, stream: object, give_back: Callable[[Block, int], None]
    ) -> None:
        self.block = block
        self.stream = stream
        self._nbytes = nbytes
        weakref.finalize(self, give_back, block, nbytes).atexit = False

    @property
    def address(self) -> int:
        """Of the first byte."""
        return self.block.address

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._nbytes
