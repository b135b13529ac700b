"""`convservice warm`: compiles the CUDA kernels that a network needs before a request waits for them.

A network is given as a filter bank, as a file, or as the name of one that a server keeps. Of that only the
layers are fetched: zeros stand for its weights. Values take no part in the choice of kernels, unless they are
not finite or close to float32's largest: the FFT and Winograd's algorithm do without such filters.
"""

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
from convservice.cli.arguments import (
    add_convolution,
    add_json,
    add_target,
    convolution,
    convolution_options,
    integers,
    load_array,
    load_network,
    positive,
)
from convservice.cli.command import Command
from convservice.cli.embedded import connected
from convservice.cli.outcome import CommandFailed, Exit
from convservice.cli.output import show_json, show_table
from convservice.dtypes import DTYPES, FLOAT32, DType, dtype_of
from convservice.errors import BackendUnavailable
from convservice.files import SUFFIX
from convservice.geometry import MAX_RANK
from convservice.layers import split_shape
from convservice.network import NAME_PREFIX, Network
from convservice.tensors import Tensor
from convservice.wire.enums import Precision
from convservice.wire.networks import network_from_proto, network_to_proto

if TYPE_CHECKING:
    from convservice_backends.cuda.device import DeviceInfo

DESCRIPTION = """\
Compiles the CUDA kernels that a network needs for inputs of one shape, so that no request waits for them, and
keeps them where a server on this machine finds them: in CONVSERVICE_KERNEL_CACHE, or in the user's cache
folder. They are for the GPU here; without one, say for which with --architecture. NETWORK is one of
  64,3,7,7             one convolution, by the shape of its filter bank: (out, in / groups, *kernel)
  weight.npy           one convolution, by a file with its filter bank
  edges.safetensors    all layers of a network in a file that convservice.save wrote
  networks/sha256-...  all layers of a network that was registered on the server at --target

Give what the requests will give: other types, or another precision, may need other kernels. If the server
runs with CONVSERVICE_CUDA_ALGORITHM set, set it here too.
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
        help="the shape of a filter bank, a file with one or with a network, or a registered network's name",
    )
    parser.add_argument(
        "--shape",
        metavar="N,C,H,W",
        type=integers,
        required=True,
        help="of the input, samples first: 1,3,224,224 for one image",
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="of the input (default: that of the weights, or float32)"
    )
    parser.add_argument(
        "--out-dtype", metavar="NAME", help="of the result (default: that of the weights, or float32)"
    )
    parser.add_argument(
        "--precision",
        choices=[one.value for one in Precision],
        default=Precision.HIGH.value,
        help="that of the requests; fast allows algorithms that round more (default: high)",
    )
    parser.add_argument(
        "--architecture",
        metavar="N",
        type=positive,
        help="compute capability, such as 90 for 9.0 (default: that of the GPU here)",
    )
    parser.add_argument(
        "--processors",
        metavar="N",
        type=positive,
        help="that GPU's multiprocessors (default: a common one's)",
    )
    add_target(parser, "the server that keeps the registered network; for that alone")
    add_convolution(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Plans, compiles what is not there yet, and says what is."""
    from convservice_backends.cuda.dry import kernels_for
    from convservice_backends.cupy.cache import KernelCache

    cache, algorithm = KernelCache(), _algorithm()
    out_dtype = dtype_of(arguments.out_dtype) if arguments.out_dtype else None
    network, spec = _problem(arguments)
    device = _device(arguments, cache)
    precision = Precision(arguments.precision)
    kernels = kernels_for(
        network, spec, device, precision=precision, out_dtype=out_dtype, algorithm=algorithm
    )
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
    given = dtype_of(arguments.dtype) if arguments.dtype else None
    text: str = arguments.network
    if text.startswith(NAME_PREFIX):
        network = _registered(arguments)
        own = _own_dtype(network)
    elif text.endswith(SUFFIX):
        network = _saved(arguments)
        own = _own_dtype(network)
    else:
        weight = _filter_bank(arguments)
        own = given or dtype_of(weight.dtype)
        network = Network([convolution(arguments, weight.astype(_weight_dtype(own, weight).numpy))])
    shape: tuple[int, ...] = arguments.shape
    rank = min(max(len(shape) - 2, 0), MAX_RANK) if network.rank is None else network.rank
    if len(shape) != rank + 2 or min(shape) < 1:
        sizes = f"2 to {MAX_RANK + 2}" if network.rank is None else rank + 2
        raise CommandFailed(
            f"--shape must have {sizes} sizes of at least 1, samples first, not {shape}", Exit.USAGE
        )
    network.output_shape(shape)
    sample = split_shape(shape, rank)[1]
    return network, TensorSpec(given or own, sample, shape[0], sample.height)


def _own_dtype(network: Network) -> DType:
    """That of the weights, or float32 where there are none."""
    return network.tensors[0].dtype if network.tensors else FLOAT32


def _registered(arguments: argparse.Namespace) -> Network:
    """The network that the server keeps, with zeros for its weights."""
    name: str = arguments.network
    if arguments.target is None:
        raise CommandFailed(
            f"a registered network is fetched from the server that keeps it: {name} needs --target HOST:PORT",
            Exit.USAGE,
        )
    _refuse_geometry(arguments)
    with connected(arguments) as client:
        fetched = client.network(name).network
    return network_from_proto(network_to_proto(fetched), _zeros)


def _saved(arguments: argparse.Namespace) -> Network:
    """The network in a file."""
    _refuse_target(arguments, "the file")
    _refuse_geometry(arguments)
    return load_network(Path(arguments.network))


def _refuse_geometry(arguments: argparse.Namespace) -> None:
    """Refuses the options of a convolution for a network whose layers have their own."""
    options = [f"--{option.replace('_', '-')}" for option in convolution_options(arguments)]
    if options:
        raise CommandFailed(
            f"the layers of a network have their own stride, padding and so on: {arguments.network} takes no"
            f" {', '.join(options)}",
            Exit.USAGE,
        )


def _refuse_target(arguments: argparse.Namespace, what: str) -> None:
    """Refuses a server where none is asked."""
    if arguments.target is not None:
        raise CommandFailed(
            f"--target says which server keeps a registered network, {NAME_PREFIX}...: no server is asked"
            f" about {what} {arguments.network}, and kernels are compiled on this machine",
            Exit.USAGE,
        )


def _zeros(reference: Tensor) -> Tensor:
    """Zeros in place of values that are not here."""
    return Tensor.adopt(np.zeros(reference.shape, reference.dtype.numpy))


def _filter_bank(arguments: argparse.Namespace) -> NDArray[Any]:
    """The filters in a file, or zeros of a shape: values do not matter here."""
    text: str = arguments.network
    _refuse_target(arguments, "the filter bank")
    if re.fullmatch(r"\d+(,\d+)+", text):
        return np.zeros(integers(text), np.float32)
    weight = load_array(Path(text))
    if weight.dtype.kind not in "biuf":
        raise CommandFailed(f"filters are real numbers; {text} holds {weight.dtype}", Exit.USAGE)
    return weight


def _weight_dtype(given: DType, weight: NDArray[Any]) -> DType:
    """That of the input, `given`; beside integers the filter bank's own, if the service has such a float."""
    if given.is_float:
        return given
    return next((dtype for dtype in DTYPES if dtype.is_float and dtype.name == weight.dtype.name), FLOAT32)


def _algorithm() -> str | None:
    """The algorithm that the environment asks for, as it does of the backend."""
    from convservice_backends.cuda.algorithms import wanted_by_environment

    try:
        return wanted_by_environment()
    except BackendUnavailable as exc:
        raise CommandFailed(exc.message, Exit.USAGE) from exc


def _device(arguments: argparse.Namespace, cache: Any) -> DeviceInfo:
    """The device asked for, or the one here."""
    from convservice_backends.cuda.device import DeviceInfo

    architecture: int | None = arguments.architecture
    if architecture is not None:
        common = max((one for one in PROCESSORS if one <= architecture), default=min(PROCESSORS))
        processors = arguments.processors or PROCESSORS[common]
        return DeviceInfo(f"sm_{architecture}", architecture, processors, MEMORY_BYTES)
    from convservice_backends.cupy.backend import imported
    from convservice_backends.cupy.device import CupyDevice

    try:
        imported()
        return CupyDevice(0, cache.path).info
    except BackendUnavailable as exc:
        raise CommandFailed(
            f"no GPU can be used here: {exc.message}; --architecture says for which one to compile"
        ) from exc


COMMAND = Command("warm", "compile the CUDA kernels of a network", DESCRIPTION, add_arguments, run)
