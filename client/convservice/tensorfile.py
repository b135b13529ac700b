"""Tensors in a file, in the safetensors format, with texts beside them.

Given named weight tensors and texts, `write` makes a file that any reader of safetensors opens; `read` hands
back both. Written here rather than through the package of that name: its interface for raw bytes, which
bfloat16 needs, differs between its versions, and a reader of our own refuses a file before it takes memory
for what the file only claims to hold. The format: the length of a JSON header as a little-endian uint64; the
header, tensor name to type, shape and place, and `__metadata__` with the texts; the tensors' packed bytes
without gaps.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from convservice.dtypes import DTYPES, DType
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_SIZE
from convservice.tensors import Tensor

MAX_HEADER_BYTES = 16 << 20
"""Longest header that is read: 512 layers take less than a tenth of it."""

_TYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {_TYPES[dtype.name]: dtype for dtype in DTYPES if dtype.name in _TYPES}
_TEXTS = "__metadata__"
_MOST_AXES = 16


def write(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Writes a file whole or not at all: what was at `path` stays until the new file is complete.

    Args:
        path: where to; a file that is there is replaced.
        tensors: by name; the order is kept.
        texts: by name.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {_TEXTS: dict(texts)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _TYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8, as the format recommends
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for tensor in tensors.values():
                file.write(tensor.packed())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the texts in a file.

    No memory is taken for a tensor before the file has shown that it is that long.

    Raises:
        OSError: there is no such file, or it cannot be read.
        InvalidRequest: `INVALID_FILE` for one that is not of this format, or damaged; it names the file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size, path)
        texts: Any = header.pop(_TEXTS, {})
        if not isinstance(texts, dict) or not all(isinstance(v, str) for v in cast("Any", texts).values()):
            raise damaged(path, f"its {_TEXTS} are not texts by name")
        tensors: dict[str, Tensor] = {}
        at = start
        for name, entry in sorted(header.items(), key=lambda item: _offset(item[1])):
            dtype, shape = _type_of(entry, name, path)
            length = math.prod(shape) * dtype.itemsize
            if entry.get("data_offsets") != [at - start, at - start + length]:
                raise damaged(path, f"tensor {name!r} is not where the one before it ends, or not as long")
            if at + length > size:
                raise damaged(path, f"it has {size} bytes, and tensor {name!r} would end at {at + length}")
            values = np.fromfile(file, dtype.packed, math.prod(shape)).reshape(shape)
            tensors[name] = Tensor.adopt(values.astype(dtype.numpy, copy=False))
            at += length
        if at != size:
            raise damaged(path, f"it has {size} bytes, its header accounts for {at}")
    return tensors, cast("dict[str, str]", texts)


def damaged(path: Path, why: str) -> InvalidRequest:
    """The error of a file that is not what it should be: `INVALID_FILE`."""
    return InvalidRequest(
        f"{path} is no network file, or is damaged: {why}",
        reason=Reason.INVALID_FILE,
        metadata={"path": str(path)},
    )


def _header(file: IO[bytes], size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file of `size` bytes, and where the tensors start."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise damaged(
            path,
            f"it has {size} bytes and does not begin with the length of a header within {MAX_HEADER_BYTES}",
        )
    try:
        header: Any = json.loads(file.read(length), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as exc:
        raise damaged(path, "its header is no JSON") from exc
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    return cast("dict[str, Any]", header), 8 + length


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; a ValueError where two have one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a JSON object has two members of one name")
    return found


def _offset(entry: Any) -> int:
    """Where a tensor says that it starts; 0 where it says nothing of use, which is refused later."""
    try:
        start = entry["data_offsets"][0]
    except (TypeError, LookupError):
        return 0
    return start if isinstance(start, int) else 0


def _type_of(entry: Any, name: str, path: Path) -> tuple[DType, tuple[int, ...]]:
    """The type and shape that a tensor's entry states."""
    if not isinstance(entry, dict):
        raise damaged(path, f"its header says nothing of use about tensor {name!r}")
    stated = cast("dict[str, Any]", entry)
    kind, shape = stated.get("dtype"), stated.get("shape")
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise damaged(path, f"tensor {name!r} has type {kind!r}; weights are {', '.join(_DTYPES)}")
    sizes = tuple(cast("Sequence[Any]", shape)) if isinstance(shape, list) else (0,)
    if len(sizes) > _MOST_AXES or not all(type(one) is int and 1 <= one <= MAX_SIZE for one in sizes):
        raise damaged(
            path, f"tensor {name!r} has no shape of at most {_MOST_AXES} sizes from 1 to {MAX_SIZE}"
        )
    return dtype, sizes
