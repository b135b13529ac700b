"""A stream of images through a session on a device, transfers included, beside what its parts take alone.

`stream_images` sends images through a bank of filters as the server would, band after band, on one device,
and measures the whole. Beside it, it measures what the whole cannot beat: the same bytes up alone, the same
convolutions alone, the same bytes down alone, and the host's copies into page-locked memory, each with
nothing beside it. How close the slowest of upload, compute and download comes to the whole is the figure;
compute over the whole is the share of the time that the device convolves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_arrays import NumpyArrays, convolved
from benchmarks.gpu_cases import ConvCase
from benchmarks.gpu_check import Wrong
from benchmarks.gpu_layers import CountedDevice
from convservice.bands import Band, TensorSpec
from convservice.dtypes import FLOAT32, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.backend import CudaBackend
from convservice_backends.cuda.convolution import ConvOperator
from convservice_backends.cuda.device import Device
from convservice_backends.cuda.lanes import SLOT_BYTES, SLOTS
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Rows, Run

Array = NDArray[Any]

DTYPES_SENT = ("float32", "uint8")
"""Dtypes of images that are streamed."""


@dataclass(frozen=True)
class Stretch:
    """What is sent.

    Attributes:
        images: how many.
        shape: of each, (channels, rows, columns).
        filters: 3x3, no padding.
        dtype: of the images; the filters are float32.
        repeats: measurements, of which the median counts.
    """

    images: int = 64
    shape: tuple[int, int, int] = (3, 1080, 1920)
    filters: int = 64
    dtype: str = "float32"
    repeats: int = 3

    @property
    def image_bytes(self) -> int:
        """Of one image."""
        return int(np.prod(self.shape)) * dtype_of(self.dtype).itemsize

    @property
    def map_bytes(self) -> int:
        """Of one image's feature map."""
        return FLOAT32.itemsize * self.filters * (self.shape[1] - 2) * (self.shape[2] - 2)


def stream_images(device: Device, stretch: Stretch) -> dict[str, Any]:
    """Measures one stretch; name of a figure to its value.

    Args:
        device: what it is measured on; memory that others keep on it for later is in the way.
        stretch: what is sent.

    Raises:
        Wrong: rows of the first or last image are not what they should be.
    """
    rng = np.random.default_rng(3)
    image = _image(rng, stretch)
    layer = Conv(rng.standard_normal((stretch.filters, stretch.shape[0], 3, 3), dtype=np.float32))
    whole, launches = _sessions(device, layer, image, stretch)

    def each(part: Callable[[], float]) -> float:
        part()
        return statistics.median(part() for _ in range(stretch.repeats))

    staged, up = _uploads(device, image, stretch)
    parts = {"upload": each(up), "compute": each(_compute(device, layer, stretch))}
    parts["download"] = each(_downloads(device, stretch))
    slowest = max(parts, key=lambda name: parts[name])
    return {
        "images": f"{stretch.images} of {'x'.join(map(str, stretch.shape))} {stretch.dtype}",
        "filters": f"{stretch.filters} of {stretch.shape[0]}x3x3 float32",
        "bytes up": stretch.images * stretch.image_bytes,
        "bytes down": stretch.images * stretch.map_bytes,
        "kernel launches an image, whole": launches,
        "upload alone, ms": parts["upload"] * 1e3,
        "compute alone, ms": parts["compute"] * 1e3,
        "what that leaves out": "turning rows to float32, copying them to where they are kept and sent from",
        "download alone, ms": parts["download"] * 1e3,
        "host's copies into page-locked memory alone, ms": each(staged) * 1e3,
        "whole, ms": whole * 1e3,
        "slowest part": slowest,
        "slowest part over whole": parts[slowest] / whole,
        "share of the time that the device convolves (compute alone over whole)": parts["compute"] / whole,
        "images a second": stretch.images / whole,
    }


def _image(rng: np.random.Generator, stretch: Stretch) -> Array:
    if stretch.dtype == "uint8":
        return rng.integers(0, 255, stretch.shape, np.uint8, endpoint=True)
    return rng.standard_normal(stretch.shape, dtype=np.float32)


def _sessions(device: Device, layer: Conv, image: Array, stretch: Stretch) -> tuple[float, float]:
    """Seconds that a session takes, and kernels that it launches for an image."""
    counted = CountedDevice(device)
    backend = CudaBackend([cast("Device", counted)], {})  # not closed: the device is needed further
    _whole(backend, layer, image, stretch)  # compiles, allocates
    before = counted.launches
    seconds = statistics.median(_whole(backend, layer, image, stretch) for _ in range(stretch.repeats))
    return seconds, (counted.launches - before) / stretch.repeats / stretch.images


def _whole(backend: CudaBackend, layer: Conv, image: Array, stretch: Stretch) -> float:
    """Seconds from the first band to the last result; every result is counted, few are copied."""
    prepared = backend.prepare(Network([layer]), Precision.HIGH)
    sample = SampleShape(image.shape[0], image.shape[1], image.shape[2:])
    plan = prepared.plan(TensorSpec(dtype_of(image.dtype), sample, stretch.images, image.shape[1]))
    seen, firsts = 0, dict[int, Array]()

    def take(band: Band) -> int:
        if band.sample in {0, stretch.images - 1} and band.first_row == 0:
            firsts[band.sample] = band.array[:1, :, :1].copy()  # looked at when time no longer counts
        return int(band.array.nbytes)

    session = prepared.open(plan, lambda: None)
    try:
        begin = time.perf_counter()
        for index in range(stretch.images):
            for band in session.submit(Band(image[None], index)):
                seen += take(band)
        for band in session.finish():
            seen += take(band)
        seconds = time.perf_counter() - begin
    finally:
        session.close()
    if seen != stretch.images * stretch.map_bytes:
        raise Wrong(f"{seen} bytes came back, not {stretch.images * stretch.map_bytes}")
    for index in (0, stretch.images - 1):
        if index not in firsts or not _is_first_row(firsts[index], layer, image):
            raise Wrong(f"the first row of image {index} is wrong")
    return seconds


def _is_first_row(found: Array, layer: Conv, image: Array) -> bool:
    """Whether a feature map's first row is within the promised bound."""
    rows, weight = image[None, :, :3].astype(np.float64), layer.weight.astype(np.float64)
    case = ConvCase("a row", "stream", rows.shape, weight.shape)
    exact = convolved(case, rows, weight)
    bound = (case.products + 4) * FLOAT32.roundoff * convolved(case, abs(rows), abs(weight))
    return bool((abs(found - exact) <= bound).all())


def _in_slots(nbytes: int) -> list[int]:
    """Sizes of the pieces that so many bytes are sent in."""
    return [min(SLOT_BYTES, nbytes - first) for first in range(0, nbytes, SLOT_BYTES)]


def _uploads(
    device: Device, image: Array, stretch: Stretch
) -> tuple[Callable[[], float], Callable[[], float]]:
    """What measures the host's copies alone, and the upload alone."""
    data, stream = np.ascontiguousarray(image).reshape(-1).view(np.uint8), device.stream()
    pieces = _in_slots(data.nbytes)
    slots = [(device.pinned(pieces[0]), stream.allocate(pieces[0])) for _ in range(SLOTS)]

    def staged() -> float:
        begin = time.perf_counter()
        for _ in range(stretch.images):
            for number, size in enumerate(pieces):
                first = number * SLOT_BYTES
                np.copyto(slots[number % SLOTS][0][:size], data[first : first + size])
        return time.perf_counter() - begin

    def sent() -> float:
        begin = time.perf_counter()
        for _ in range(stretch.images):
            for number, size in enumerate(pieces):
                host, memory = slots[number % SLOTS]
                stream.upload(host[:size], memory)
        stream.synchronize()
        return time.perf_counter() - begin

    return staged, sent


def _downloads(device: Device, stretch: Stretch) -> Callable[[], float]:
    """What measures the download alone."""
    stream = device.stream()
    pieces = _in_slots(stretch.map_bytes)
    slots = [(device.pinned(pieces[0]), stream.allocate(pieces[0])) for _ in range(SLOTS)]

    def sent() -> float:
        begin = time.perf_counter()
        for _ in range(stretch.images):
            for number, size in enumerate(pieces):
                host, memory = slots[number % SLOTS]
                stream.download(memory, host[:size])
        stream.synchronize()
        return time.perf_counter() - begin

    return sent


def _compute(device: Device, layer: Conv, stretch: Stretch) -> Callable[[], float]:
    """What measures the convolutions alone, an image at a time, on rows that are on the device as float32."""
    info, stream = device.info, device.stream()
    arrays = NumpyArrays(stream)
    given = SampleShape(stretch.shape[0], stretch.shape[1], stretch.shape[2:])
    whole = layer.output_sample(given)
    operator = ConvOperator(layer, FLOAT32, given, precision=Precision.HIGH, info=info)
    weights = tuple(arrays.held(array).memory for array in operator.weights())
    rng = np.random.default_rng(4)
    x = DeviceArray.packed(
        arrays.held(rng.standard_normal((1, *stretch.shape), dtype=np.float32)).memory,
        (1, *stretch.shape),
        FLOAT32,
    )
    y_shape = (1, whole.channels, whole.height, *whole.rest)
    y = DeviceArray.packed(stream.allocate(stretch.map_bytes), y_shape, FLOAT32)
    wanted = operator.scratch_bytes(whole, whole.height, 1)
    scratch = stream.allocate(wanted) if wanted else None
    workspace = DeviceWorkspace(stream, scratch, info, lambda: None)
    run = Run((Rows(x, 0),), given.rows, 0, whole.height, operator.block_plan(given, whole))

    def computed() -> float:
        begin = time.perf_counter()
        for _ in range(stretch.images):
            operator.compute(run, y, workspace, weights)
        stream.synchronize()
        return time.perf_counter() - begin

    return computed
