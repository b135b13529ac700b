"""Tensors that a convolution on a device reads and writes, and the exact answer to compare it with.

`TorchArrays` keeps tensors of PyTorch on the GPU: the project's kernels and cuDNN are given the very same
memory, and the float64 reference is computed there too. `NumpyArrays` does the same on the host for a device
that is emulated, so that whatever uses them can be tried without a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_cases import ConvCase
from convservice.dtypes import DType
from convservice_backends.cuda.device import Memory, Stream
from convservice_backends.reference import rounded

Floats = NDArray[np.float64]

LARGEST_INTEGER = 2
"""Integer-valued tensors hold -2 to 2: a sum of up to 2**18 products stays exact in float32."""

MOST_KEPT = 8 << 30
"""Bytes that PyTorch may keep for later between two cases."""


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor with the device memory that holds it."""

    array: Any
    memory: Memory


class Arrays(Protocol):
    """One library's arrays, on or beside one device."""

    def random(self, shape: tuple[int, ...], dtype: DType, *, integers: bool, seed: int) -> Any:
        """Normally distributed values, or small integers."""
        ...

    def repeated(self, base: Any, samples: int) -> Any:
        """So many samples, those of `base` over and over."""
        ...

    def held(self, array: Any) -> Held:
        """The array in device memory; a copy where the library's arrays are elsewhere."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Held:
        """Memory to write to, filled with NaN."""
        ...

    def read(self, held: Held) -> Any:
        """What is in the memory once the device is done."""
        ...

    def host(self, array: Any) -> NDArray[Any]:
        """As NumPy's."""
        ...

    def convolved(self, case: ConvCase, x: Any, weight: Any) -> Any:
        """The float64 convolution of float64 arrays, of as many samples as `x` has."""
        ...

    def double(self, array: Any) -> Any:
        """In float64."""
        ...

    def rounded(self, array: Any, dtype: DType) -> Any:
        """Float64 values rounded once to a dtype, again in float64."""
        ...

    def synchronize(self) -> None:
        """Returns when the library's own work on the device is done: other streams do not wait for it."""
        ...

    def tidy(self, most: int = MOST_KEPT) -> None:
        """Gives back memory that the library keeps for later if it is more than `most` bytes: others take
        from the same device."""
        ...


def convolved(case: ConvCase, x: Floats, weight: Floats, mode: str = "zeros") -> Floats:
    """A convolution of as many samples as `x` has, tap by tap, in the type of `x` (float64 or wider).

    Args:
        case: its geometry.
        x: (N, channels, *spatial).
        weight: the filter bank.
        mode: of padding: zeros, reflect or replicate.
    """
    filled: Any = {"zeros": "constant", "reflect": "reflect", "replicate": "edge"}[mode]
    padded = np.pad(x, [(0, 0), (0, 0), *[(case.padding, case.padding)] * (x.ndim - 2)], mode=filled)
    sizes, groups = case.y[2:], case.groups
    total = np.zeros((x.shape[0], groups, case.weight[0] // groups, *sizes), x.dtype)
    banks = weight.reshape(groups, -1, *weight.shape[1:])
    for index, tap in enumerate(itertools.product(*(range(size) for size in case.weight[2:]))):
        reads = tuple(
            slice(at * case.dilation, at * case.dilation + (size - 1) * case.stride + 1, case.stride)
            for at, size in zip(tap, sizes, strict=True)
        )
        seen = padded[(slice(None), slice(None), *reads)]
        seen = seen.reshape(x.shape[0], groups, -1, math.prod(sizes))
        taps = banks.reshape(*banks.shape[:3], -1)[..., index]
        total += (taps @ seen).reshape(total.shape)
    return total.reshape(x.shape[0], *case.y[1:])


class NumpyArrays:
    """Arrays of the host, copied to and from a device.

    Args:
        stream: on which they are copied.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def random(self, shape: tuple[int, ...], dtype: DType, *, integers: bool, seed: int) -> NDArray[Any]:
        """See `Arrays`."""
        rng = np.random.default_rng(seed)
        if integers:
            return rng.integers(-LARGEST_INTEGER, LARGEST_INTEGER, shape, endpoint=True).astype(dtype.numpy)
        return rng.standard_normal(shape).astype(dtype.numpy)

    def repeated(self, base: NDArray[Any], samples: int) -> NDArray[Any]:
        """See `Arrays`."""
        return np.ascontiguousarray(base[np.arange(samples) % len(base)])

    def held(self, array: NDArray[Any]) -> Held:
        """See `Arrays`."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory = self._stream.allocate(data.nbytes)
        self._stream.upload(data, memory)
        self._stream.synchronize()
        return Held(array, memory)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Held:
        """See `Arrays`."""
        return self.held(np.full(shape, np.nan).astype(dtype.numpy))

    def read(self, held: Held) -> NDArray[Any]:
        """See `Arrays`."""
        data: NDArray[np.uint8] = held.array.reshape(-1).view(np.uint8)
        self._stream.download(held.memory, data)
        self._stream.synchronize()
        found: NDArray[Any] = held.array
        return found

    def host(self, array: NDArray[Any]) -> NDArray[Any]:
        """See `Arrays`."""
        return array

    def convolved(self, case: ConvCase, x: Floats, weight: Floats) -> Floats:
        """See `Arrays`."""
        return convolved(case, x, weight)

    def double(self, array: NDArray[Any]) -> Floats:
        """See `Arrays`."""
        return array.astype(np.float64)

    def rounded(self, array: Floats, dtype: DType) -> Floats:
        """See `Arrays`."""
        return rounded(array, dtype).astype(np.float64)

    def synchronize(self) -> None:
        """See `Arrays`; the copies were waited for."""

    def tidy(self, most: int = MOST_KEPT) -> None:
        """See `Arrays`; NumPy keeps none."""


@dataclass(frozen=True)
class TensorMemory:
    """A tensor's memory; see `cuda.device.Memory`."""

    tensor: Any

    @property
    def address(self) -> int:
        """Of the first element."""
        return int(self.tensor.data_ptr())

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(self.tensor.numel() * self.tensor.element_size())


class TorchArrays:
    """PyTorch's tensors on the current GPU.

    Args:
        device: PyTorch's name of it.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.torch: Any = import_module("torch")
        self.device = device

    def random(self, shape: tuple[int, ...], dtype: DType, *, integers: bool, seed: int) -> Any:
        """See `Arrays`."""
        torch = self.torch
        generator = torch.Generator(self.device).manual_seed(seed)
        if integers:
            most = LARGEST_INTEGER
            found = torch.randint(-most, most + 1, shape, generator=generator, device=self.device)
        else:
            found = torch.randn(shape, generator=generator, device=self.device)
        return found.to(getattr(torch, dtype.name))

    def repeated(self, base: Any, samples: int) -> Any:
        """See `Arrays`."""
        return base[self.torch.arange(samples, device=self.device) % len(base)].contiguous()

    def held(self, array: Any) -> Held:
        """See `Arrays`."""
        tensor = array
        if isinstance(array, np.ndarray):
            found: NDArray[Any] = cast("Any", array)
            data = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
            tensor = self.torch.from_numpy(data.copy()).to(self.device)
        return Held(tensor, TensorMemory(tensor))

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Held:
        """See `Arrays`."""
        kind = getattr(self.torch, dtype.name)
        return self.held(self.torch.full(shape, math.nan, dtype=kind, device=self.device))

    def read(self, held: Held) -> Any:
        """See `Arrays`."""
        self.torch.cuda.synchronize()
        return held.array

    def host(self, array: Any) -> NDArray[Any]:
        """See `Arrays`."""
        name = str(array.dtype).removeprefix("torch.")
        if name == "bfloat16":  # NumPy has none: as integers, then seen as what they are
            import ml_dtypes

            bits: NDArray[Any] = array.view(self.torch.int16).cpu().numpy()
            return bits.view(ml_dtypes.bfloat16)
        found: NDArray[Any] = array.cpu().numpy()
        return found

    def convolved(self, case: ConvCase, x: Any, weight: Any) -> Any:
        """See `Arrays`."""
        with self.torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            return self.convolution(case)(x, weight)

    def convolution(self, case: ConvCase) -> Callable[[Any, Any], Any]:
        """PyTorch's convolution with a case's geometry, of any dtype."""
        function = getattr(self.torch.nn.functional, f"conv{len(case.x) - 2}d")

        def convolve(x: Any, weight: Any) -> Any:
            return function(x, weight, **case.geometry)

        return convolve

    def double(self, array: Any) -> Any:
        """See `Arrays`."""
        return array.double()

    def rounded(self, array: Any, dtype: DType) -> Any:
        """See `Arrays`: exact in float32 first where it is asked of integers below 2**24."""
        return array.to(getattr(self.torch, dtype.name)).double()

    def synchronize(self) -> None:
        """See `Arrays`."""
        self.torch.cuda.synchronize()

    def tidy(self, most: int = MOST_KEPT) -> None:
        """See `Arrays`."""
        if self.device == "cuda" and self.torch.cuda.memory_reserved() > most:
            self.torch.cuda.empty_cache()
