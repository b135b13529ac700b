"""The CuPy backend where there is no GPU: why it refuses, and its device on a stand-in for CuPy."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convservice.dtypes import FLOAT32
from convservice.errors import BackendUnavailable, InternalError, Reason, ResourceExhausted
from convservice.layers import Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends import trial
from convservice_backends.cuda.algorithms import VARIABLE
from convservice_backends.cuda.device import Transform
from convservice_backends.cupy import backend as module
from convservice_backends.cupy.backend import CupyBackend
from convservice_backends.cupy.device import CupyMemory
from convservice_backends.cupy.transforms import Plans
from convservice_backends.registry import Registry
from tests.devices.fake_cupy import CUDADriverError, CUDARuntimeError, CuFFTError, FakeCupy, Pointer
from tests.helpers import Array, assert_same_bits, chain, check_every_layer, every_map, random_array, run

MODULES: dict[str, Any] = sys.modules


@pytest.fixture
def cupy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """CuPy's stand-in, with a driver and one device."""
    fake = FakeCupy(tmp_path)
    monkeypatch.setitem(MODULES, "cupy", fake)
    monkeypatch.setattr(module, "find_spec", installed)
    monkeypatch.setattr(module, "DRIVER", ctypes.util.find_library("c"))
    monkeypatch.setattr(module, "KernelCache", lambda: fake)
    for variable in (module.MEMORY_VARIABLE, VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return fake


def installed(name: str) -> object:
    return object()


def not_installed(name: str) -> None:
    return None


def refusal() -> str:
    with pytest.raises(BackendUnavailable) as caught:
        CupyBackend()
    assert caught.value.reason == Reason.BACKEND_UNAVAILABLE
    return caught.value.message


def fail(error: Exception) -> None:
    raise error


def test_each_step_of_the_detection_has_its_reason(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    CupyBackend().close()
    runtime = cupy.cuda.runtime
    with monkeypatch.context() as patch:
        patch.setattr(module, "find_spec", not_installed)
        assert refusal().startswith("CuPy is not installed: pip install 'convservice[server,cuda13]'")
    with monkeypatch.context() as patch:
        patch.setattr(module, "DRIVER", "libno-such-driver.so.1")
        assert refusal().startswith("there is no NVIDIA driver here (libno-such-driver.so.1")
    with monkeypatch.context() as patch:
        patch.setitem(MODULES, "cupy", None)
        assert refusal().startswith("CuPy cannot be imported (ModuleNotFoundError")
    with monkeypatch.context() as patch:
        patch.setattr(
            runtime, "getDeviceCount", lambda: fail(CUDARuntimeError("cudaErrorNoDevice: none", 100))
        )
        assert refusal() == "the CUDA driver does not answer: cudaErrorNoDevice: none"
    with monkeypatch.context() as patch:
        patch.setattr(cupy, "devices", [])
        assert refusal() == "the CUDA driver sees no device"
    with monkeypatch.context() as patch:
        busy = CUDARuntimeError("cudaErrorDevicesUnavailable: busy", 46)
        patch.setattr(runtime, "memGetInfo", lambda: fail(busy))
        patch.setattr(cupy, "works", False)
        assert refusal().startswith("no CUDA device answers: CUDA device 0 failed for good: ")
    with monkeypatch.context() as patch:
        patch.setattr(cupy, "before_launch", lambda: fail(CUDADriverError("CUDA_ERROR_NO_BINARY: x", 209)))
        assert refusal().startswith(
            "the trial with the worked example failed: the device refused a call: CUDA_ERROR_NO_BINARY"
        )


def test_a_device_that_computes_nonsense_is_refused(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "FEATURE_MAP", np.array([[12, 12, 17], [10, 17, 19], [9, 6, 15]], np.float32))
    assert (
        "for the worked example, expected [[12.0, 12.0, 17.0], [10.0, 17.0, 19.0], [9.0, 6.0, 15.0]]"
        in refusal()
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (module.MEMORY_VARIABLE, "8GB", "CONVSERVICE_DEVICE_MEMORY must be a number of bytes, not '8GB'"),
        (module.MEMORY_VARIABLE, "0", "CONVSERVICE_DEVICE_MEMORY must be a number of bytes, not '0'"),
        (VARIABLE, "magic", "CONVSERVICE_CUDA_ALGORITHM must be one of direct, "),
    ],
)
def test_settings_that_are_wrong_are_reasons(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert message.split("direct", maxsplit=1)[0] in refusal()


def test_the_registry_keeps_the_reason_and_auto_goes_on(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cupy, "devices", [])
    registry = Registry(factories={"cupy": CupyBackend, "numpy": lambda: fail_to("numpy is broken too")})
    first, second = registry.statuses()
    assert (first.name, first.is_default) == ("cupy", False)
    assert first.reason.startswith("backend 'cupy' cannot run here: the CUDA driver sees no device")
    assert second.reason.endswith("numpy is broken too")


def fail_to(why: str) -> Any:
    raise BackendUnavailable(why, reason=Reason.BACKEND_UNAVAILABLE)


def test_it_describes_its_devices(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy.devices = ["fake", "other", "fake"]
    monkeypatch.setenv(module.MEMORY_VARIABLE, str(64 << 20))
    backend = CupyBackend()
    described = backend.describe()
    assert (described.device, described.workers) == ("fake", 2), "devices of another model are not used"
    assert described.versions["cuda_driver"] == "13.0"
    assert set(described.versions) == {"convservice", "cupy", "cuda_driver", "nvrtc"}
    assert [context.device.info.memory_bytes for context in backend.contexts] == [64 << 20] * 2
    backend.close()


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("rows", [None, 7])
def test_it_computes(cupy: FakeCupy, devices: int, rows: int | None, rng: np.random.Generator) -> None:
    cupy.devices = ["fake"] * devices
    backend = CupyBackend()
    network, x = every_map(chain(rng, FLOAT32)), random_array(rng, (5, 2, 30, 11), FLOAT32)
    check_every_layer(network, x, run(backend.prepare(network, Precision.HIGH), x, rows))
    backend.close()


@pytest.mark.parametrize(
    ("algorithm", "dtype", "filters"), [("tensor_core", "float16", 128), ("winograd", "float32", 64)]
)
def test_kernels_get_the_shared_memory_that_they_ask_for(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, algorithm: str, dtype: str, filters: int
) -> None:
    """More than 48 KiB must be asked for before a launch; the stand-in refuses as CUDA does."""
    monkeypatch.setenv(VARIABLE, algorithm)
    monkeypatch.setattr(cupy, "processors", 1)
    taken = set[int]()
    cupy.on_launch = lambda kernel: taken.add(kernel.dynamic_bytes)
    backend = CupyBackend()
    layer = Conv(np.ones((filters, 16, 3, 3), dtype), padding=1)
    found = run(backend.prepare(Network([layer]), Precision.FAST), np.ones((1, 16, 16, 16), dtype))
    assert (found["output"][0, :, 1:-1, 1:-1] == 144).all()
    assert max(taken) > 48 << 10
    backend.close()


@pytest.mark.parametrize("rank", [1, 2])
def test_it_transforms(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, rank: int, rng: np.random.Generator
) -> None:
    monkeypatch.setenv(VARIABLE, "fourier")
    backend = CupyBackend()
    layers = (random_array(rng, shape[: 2 + rank], FLOAT32) for shape in ((2, 1, 5, 5), (1, 2, 3, 7)))
    network = every_map(Network(list(map(Conv, layers))))
    x = random_array(rng, (2, 1, 80, 12)[: 2 + rank], FLOAT32)
    prepared = backend.prepare(network, Precision.HIGH)
    first = run(prepared, x)
    check_every_layer(network, x, first)
    made = cupy.plans
    assert made > 0
    assert_same_bits(first, run(prepared, x), "again")
    assert cupy.plans == made, "plans are kept with their stream"
    backend.close()


def test_the_errors_of_transforms_become_the_projects(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = CupyMemory(SimpleNamespace(ptr=256), 4096)
    transform = Transform(memory, 0, 1024, 2, 8, 8, inverse=False)
    for name, error in (("CUFFT_ALLOC_FAILED", ResourceExhausted), ("CUFFT_INTERNAL_ERROR", InternalError)):
        monkeypatch.setattr(cupy.cuda.cufft, "PlanNd", partial(refuse, CuFFTError(name)))
        with pytest.raises(error, match=name):
            Plans(cupy).run(transform, Pointer(4096))
    with pytest.raises(BackendUnavailable, match=r"cuFFT, which cannot be loaded .*: pip install"):
        Plans(SimpleNamespace(cuda=WithoutCufft())).run(transform, Pointer(4096))


def refuse(error: Exception, *_: object) -> None:
    raise error


class WithoutCufft:
    """`cupy.cuda` where the library is not installed."""

    @property
    def cufft(self) -> Any:
        raise ImportError('Failure finding "libcufft.so.12"')


def small(rng: np.random.Generator) -> tuple[Network, Array]:
    return Network([Conv(random_array(rng, (2, 1, 3, 3), FLOAT32))]), random_array(rng, (1, 1, 9, 9), FLOAT32)


@pytest.mark.parametrize(
    ("lost_for_good", "works"),
    [
        (CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access", 700), True),
        (CUDADriverError("CUDA_ERROR_INVALID_PC: invalid program counter", 718), True),
        (CUDARuntimeError("cudaErrorUnknown: unknown error", 999), False),
    ],
    ids=str,
)
def test_the_devices_errors_become_the_projects(
    cupy: FakeCupy, lost_for_good: CUDARuntimeError, works: bool, rng: np.random.Generator
) -> None:
    backend, (network, x) = CupyBackend(), small(rng)
    prepared = backend.prepare(network, Precision.HIGH)
    expected = run(prepared, x)

    memory = CUDARuntimeError("cudaErrorMemoryAllocation: out of memory", 2)
    cupy.before_launch = partial(fail, memory)
    with pytest.raises(ResourceExhausted, match="cudaErrorMemoryAllocation") as exhausted:
        run(prepared, x)
    assert exhausted.value.reason == Reason.OUT_OF_DEVICE_MEMORY
    for error in (
        CUDARuntimeError("cudaErrorInvalidValue: invalid argument", 1),
        CUDADriverError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many", 701),
    ):
        cupy.before_launch = partial(fail, error)
        with pytest.raises(InternalError, match=str(error)):
            run(prepared, x)
    cupy.before_launch = lambda: None
    assert backend.failure == ""
    assert_same_bits(expected, run(prepared, x), "the backend works on")

    cupy.before_launch = partial(fail, lost_for_good)
    cupy.works = works
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=str(lost_for_good)) as lost:
            run(prepared, x)
        assert lost.value.reason == Reason.DEVICE_LOST
        cupy.before_launch = lambda: None  # it stays lost
    assert backend.failure == f"CUDA device 0 failed for good: {lost_for_good}"
    assert [context.memory.promised for context in backend.contexts] == [0]
    backend.close()


def test_page_locked_memory_runs_out(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    backend, (network, x) = CupyBackend(), small(rng)
    prepared = backend.prepare(network, Precision.HIGH)
    with monkeypatch.context() as patch:
        memory = CUDARuntimeError("cudaErrorMemoryAllocation: out of memory", 2)
        patch.setattr(cupy.cuda, "alloc_pinned_memory", partial(refuse, memory))
        with pytest.raises(ResourceExhausted, match=r"the host has no \d+ bytes of page-locked memory left"):
            run(prepared, x)
    run(prepared, x)
    backend.close()


def test_memory_is_limited(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setenv(module.MEMORY_VARIABLE, str(100 << 10))
    backend, (network, x) = CupyBackend(), small(rng)
    prepared = backend.prepare(network, Precision.HIGH)
    run(prepared, x)
    with pytest.raises(ResourceExhausted, match="bytes of device memory"):
        run(prepared, random_array(rng, (1, 1, 300, 300), FLOAT32))
    run(prepared, x)


def test_every_device_is_tried(cupy: FakeCupy) -> None:
    cupy.devices, launched = ["fake"] * 3, list[int]()
    cupy.before_launch = lambda: launched.append(1)
    backend = CupyBackend()
    everywhere = len(launched)
    backend.close()
    launched.clear()
    cupy.devices = ["fake"]
    CupyBackend().close()
    assert everywhere == 3 * len(launched) > 0


def test_memory_that_is_only_kept_for_later_gives_way(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy's pool at its limit does not give up what it keeps by itself."""
    monkeypatch.setenv(module.MEMORY_VARIABLE, str(1 << 20))
    (context,) = CupyBackend().contexts
    device: Any = context.device
    stream, pool = device.stream(), device._pool
    for size in (500 << 10, 700 << 10, 300 << 10):
        assert stream.allocate(size).nbytes == size
    assert pool.total_bytes() <= 1 << 20
    weights = device.allocate(800 << 10)
    with pytest.raises(ResourceExhausted):
        stream.allocate(300 << 10)
    assert pool.total_bytes() + weights.nbytes <= 1 << 20, "weights are of the same limit"
    del weights
    assert stream.allocate(900 << 10).nbytes == 900 << 10


def test_all_that_it_calls_is_there_in_cupy() -> None:
    cupy: Any = import_module("cupy")
    for path in (
        "__version__",
        "RawModule.get_function",
        "cuda.Device.id",
        "cuda.Stream.wait_event",
        "cuda.Stream.synchronize",
        "cuda.Event.record",
        "cuda.Event.done",
        "cuda.Event.synchronize",
        "cuda.MemoryPool.malloc",
        "cuda.MemoryPool.set_limit",
        "cuda.MemoryPool.total_bytes",
        "cuda.MemoryPool.free_all_blocks",
        "cuda.alloc_pinned_memory",
        "cuda.using_allocator",
        "cuda.MemoryPointer.__add__",
        "ndarray",
        "cuda.MemoryPointer",
        "cuda.memory.Memory",
        "cuda.memory.OutOfMemoryError",
        "cuda.pinned_memory.PinnedMemory",
        "cuda.pinned_memory.PinnedMemoryPointer",
        "cuda.runtime.deviceSynchronize",
        "cuda.driver.CUDADriverError",
        "cuda.runtime.CUDARuntimeError",
        "cuda.runtime.getDeviceCount",
        "cuda.runtime.getDeviceProperties",
        "cuda.runtime.memGetInfo",
        "cuda.runtime.driverGetVersion",
        "cuda.runtime.memcpyAsync",
        "cuda.runtime.memcpyHostToDevice",
        "cuda.runtime.memcpyDeviceToHost",
    ):
        found: Any = cupy
        for name in path.split("."):
            found = getattr(found, name)
    assert "max_dynamic_shared_size_bytes" in dir(cupy.RawKernel)
