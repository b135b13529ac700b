"""`convservice warm`: compiles the CUDA kernels that a network needs before a request waits for them."""

from __future__ import annotations

import argparse
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convservice.bands import TensorSpec
from convservice.cli.arguments import add_convolution, add_json, integers, load_array, positive
from convservice.cli.command import Command
from convservice.cli.outcome import CommandFailed, Exit
from convservice.cli.output import show_json, show_table
from convservice.dtypes import FLOAT32, DType, dtype_of
from convservice.errors import BackendUnavailable
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.network import Network
from convservice.wire.enums import Precision

if TYPE_CHECKING:
    from convservice_backends.cuda.device import DeviceInfo

DESCRIPTION = """\
Compiles the CUDA kernels that a convolution of this shape needs on a GPU, and keeps them where the server on
this machine finds them: in CONVSERVICE_KERNEL_CACHE, or in the user's cache folder. Without a GPU, say for
which one with --architecture.
"""

PROCESSORS = {75: 40, 80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
"""Architecture to the multiprocessors of a common device: T4, A100, A40, L40S, H100, B200, RTX 5090 (NVIDIA's
data sheets). How work is cut into blocks follows it."""

MEMORY_BYTES = 1 << 40
"""Taken for granted where there is no device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "network",
        metavar="NETWORK",
        help="a filter bank (out, in / groups, *kernel) in a .npy file, or its shape alone, such as 64,3,7,7",
    )
    parser.add_argument(
        "--shape", metavar="N,C,H,W", type=integers, required=True, help="of the input, samples first"
    )
    parser.add_argument("--dtype", help="of the input (default: the filter bank's, or float32)")
    parser.add_argument("--precision", choices=[one.value for one in Precision], default=Precision.HIGH.value)
    parser.add_argument(
        "--architecture",
        metavar="N",
        type=positive,
        help="compute capability, such as 90 for 9.0 (default: that of the GPU here)",
    )
    parser.add_argument(
        "--processors", metavar="N", type=positive, help="its multiprocessors (default: a common device's)"
    )
    add_convolution(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Plans, compiles what is not there yet, and says what is."""
    from convservice_backends.cuda.dry import kernels_for
    from convservice_backends.cupy.cache import KernelCache

    cache = KernelCache()
    network, spec = _problem(arguments)
    device = _device(arguments, cache)
    kernels = kernels_for(network, spec, device, precision=Precision(arguments.precision))
    started = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(cache.path, kernels, [device.architecture] * len(kernels)))
    elapsed = time.perf_counter() - started
    if any(path.parent != cache.folder for path in paths):
        raise CommandFailed(
            f"compiled kernels cannot be kept in {cache.folder}; nothing is warmer than before"
        )
    if arguments.json:
        show_json(
            {
                "architecture": device.architecture,
                "folder": str(cache.folder),
                "kernels": {kernel.name: path.name for kernel, path in zip(kernels, paths, strict=True)},
                "compiled": cache.compiled,
                "found": cache.found,
                "seconds": elapsed,
            }
        )
        return Exit.OK
    rows = [(kernel.name, path.stat().st_size) for kernel, path in zip(kernels, paths, strict=True)]
    show_table(f"kernels for sm_{device.architecture}", ("kernel", "bytes "), rows)
    print(f"\n{cache.compiled} compiled in {elapsed:.2f} s, {cache.found} were there; in {cache.folder}")
    return Exit.OK


def _problem(arguments: argparse.Namespace) -> tuple[Network, TensorSpec]:
    """The network and the tensor that the arguments describe."""
    weight = _filter_bank(arguments.network)
    dtype = dtype_of(arguments.dtype) if arguments.dtype else dtype_of(weight.dtype)
    layer = Conv(
        weight.astype(_weight_dtype(dtype).numpy),
        stride=arguments.stride,
        padding=arguments.padding,
        dilation=arguments.dilation,
        groups=arguments.groups,
        padding_mode=arguments.padding_mode,
        activation=arguments.activation,
    )
    shape: tuple[int, ...] = arguments.shape
    if len(shape) != layer.rank + 2 or min(shape) < 1:
        raise CommandFailed(
            f"--shape must have {layer.rank + 2} sizes of at least 1, samples first, not {shape}", Exit.USAGE
        )
    layer.output_shape(shape)
    sample = SampleShape(shape[1], shape[2], shape[3:])
    return Network([layer]), TensorSpec(dtype, sample, shape[0], shape[2])


def _filter_bank(text: str) -> NDArray[Any]:
    """The filters in a file, or zeros of a shape: values do not matter here."""
    if re.fullmatch(r"\d+(,\d+)+", text):
        return np.zeros(integers(text), np.float32)
    return load_array(Path(text))


def _weight_dtype(dtype: DType) -> DType:
    return dtype if dtype.is_float else FLOAT32


def _device(arguments: argparse.Namespace, cache: Any) -> DeviceInfo:
    """The device asked for, or the one here."""
    from convservice_backends.cuda.device import DeviceInfo

    architecture: int | None = arguments.architecture
    if architecture is not None:
        common = max((one for one in PROCESSORS if one <= architecture), default=min(PROCESSORS))
        processors = arguments.processors or PROCESSORS[common]
        return DeviceInfo(f"sm_{architecture}", architecture, processors, MEMORY_BYTES)
    try:
        from convservice_backends.cupy.device import CupyDevice

        return CupyDevice(0, cache.path).info
    except (ImportError, BackendUnavailable) as exc:
        raise CommandFailed(
            f"no GPU can be used here ({exc}); --architecture says for which one to compile"
        ) from exc


COMMAND = Command("warm", "compile the CUDA kernels of a network", DESCRIPTION, add_arguments, run)
