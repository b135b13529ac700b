"""The peer: the same convolution by PyTorch, which gives it to cuDNN or to kernels of its own.

`measure_peer` is given a case with its tensors and hands on the time, the error, and whose kernel it was.
PyTorch decides whose: contiguous depthwise layers in float32 it keeps for itself, unless it can be told to
leave them to cuDNN (since PyTorch 2.13), and then it is told so.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_arrays import TorchArrays
from benchmarks.gpu_cases import ConvCase
from benchmarks.gpu_check import Computed, error_share
from benchmarks.gpu_clocks import Times, copies_for
from benchmarks.gpu_layers import Rig, Tensors

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"

CUDNN, OWN, UNKNOWN = "cuDNN", "PyTorch's own", "cuDNN or PyTorch's own"
"""Whose kernel it was."""


@dataclass(frozen=True)
class PeerMeasured:
    """The peer on a case.

    Attributes:
        library: whose kernel it was.
        error: largest error as a share of what this project promises; it may be more than 1.
        times: of one call.
    """

    library: str
    error: float
    times: Times


def measure_peer(
    rig: Rig, case: ConvCase, precision: str, tensors: Tensors, layout: str
) -> PeerMeasured | None:
    """Measures the peer on the same tensors; None where there is no peer.

    Args:
        rig: what it is measured on.
        case: the case.
        precision: as the table has it; TF32 is allowed for "tf32" alone.
        tensors: the case's.
        layout: "contiguous", as the project reads them, or "channels_last": the tensors put so beforehand;
            PyTorch has none for one spatial axis.
    """
    arrays, clock = rig.arrays, rig.peer_clock
    if clock is None or not isinstance(arrays, TorchArrays):
        return None
    torch, convolve = arrays.torch, arrays.convolution(case)
    copies = copies_for(case.moved(tensors.dtype.itemsize), clock.cache_bytes)

    def placed(tensor: Any) -> Any:
        if layout == CONTIGUOUS:
            return tensor.clone()
        kind = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.clone(memory_format=kind)

    xs = [placed(tensors.x.array) for _ in range(copies)]
    weights = [placed(tensors.weight) for _ in range(copies)]
    maps: list[Any] = [None] * copies

    def ask(piece: int) -> None:
        maps[piece % copies] = convolve(xs[piece % copies], weights[piece % copies])

    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    flags = torch.backends.cudnn.flags
    wanted: dict[str, Any] = {"enabled": True, "benchmark": True, "deterministic": False}
    if "depthwise_kernel" in inspect.signature(flags).parameters:
        wanted["depthwise_kernel"] = "cudnn"
    with torch.no_grad(), flags(**wanted, allow_tf32=allowed):
        library = library_of(torch, case, xs[0], weights[0])
        ask(0)
        torch.cuda.synchronize()
        computed = Computed(case, tensors.dtype, tensors.base, tensors.weight, maps[0])
        # With TF32 the bound is that of `tensor_core`. Without, an error far above others shows it was on.
        error = error_share(arrays, computed, "tensor_core" if allowed else "direct")
        return PeerMeasured(library, error, clock.times(ask, copies))


def library_of(torch: Any, case: ConvCase, x: Any, weight: Any) -> str:
    """Whose kernel PyTorch takes under the flags that are set; it may not be able to say."""
    axes = len(case.x) - 2
    geometry = [[size] * axes for size in (case.stride, case.padding, case.dilation)]
    try:
        choice = torch._C._select_conv_backend(  # noqa: SLF001 - nothing public says it
            x, weight, None, *geometry, False, [0] * axes, case.groups, None
        )
    except (AttributeError, TypeError):
        return UNKNOWN
    return CUDNN if "cudnn" in str(choice).lower() else OWN
