"""What the GPU benchmark counts, checks and measures, where there is no GPU."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_arrays import Held, NumpyArrays, convolved
from benchmarks.gpu_cases import FAMILIES, TINY, ConvCase
from benchmarks.gpu_check import Computed, Wrong, demand_bounded, demand_exact, error_share
from benchmarks.gpu_clocks import MOST_CALLS, MOST_COPIES, EventClock, HostClock, calls_for, copies_for
from benchmarks.gpu_layers import LayerOnDevice, Rig, measure, tensors_of
from benchmarks.gpu_peer import library_of
from benchmarks.gpu_run import algorithms_of
from benchmarks.gpu_stream import Stretch, stream_images
from convservice.dtypes import FLOAT32
from convservice.layers import Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms import base
from convservice_backends.cupy.device import CupyDevice
from convservice_backends.reference import layer_reference
from convservice_emulator.build import Compiler
from convservice_emulator.device import EmulatedDevice
from tests.devices.fake_cupy import FakeCupy
from tests.helpers import random_array, small_integers

MODULES: dict[str, Any] = sys.modules

EVERY_CASE = [case for family in (*FAMILIES, TINY) for case in family.cases]

FIRST = next(case for case in FAMILIES[0].cases if case.weight[2:] == (7, 7))


@pytest.fixture
def arrays(compiler: Compiler) -> NumpyArrays:
    return NumpyArrays(EmulatedDevice(compiler).stream())


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: f"{case.family}: {case.name}")
def test_the_shapes_of_a_case_are_those_of_its_layer(case: ConvCase) -> None:
    options: Any = case.geometry
    layer = Conv(np.zeros(case.weight, np.float32), **options)
    assert layer.output_shape(case.x) == case.y
    assert case.at_batch(3).y == (3, *case.y[1:])


def test_each_layer_of_a_network_is_there_once() -> None:
    counts = {family.name: len({(c.x, c.weight, c.stride) for c in family.cases}) for family in FAMILIES}
    assert counts == {
        "ResNet-50": 23,
        "VGG-16": 9,
        "MobileNet depthwise": 9,
        "ResNeXt-50 groups": 7,
        "1080p filter": 9,
        "conv1d": 4,
        "conv3d (C3D)": 7,
    }
    for family in FAMILIES:
        assert len({case.name for case in family.cases}) == len(family.cases)


def test_operations_and_bytes_are_those_counted_by_hand() -> None:
    # 64 maps of 112 x 112, 3 * 7 * 7 = 147 products each
    assert FIRST.y == (1, 64, 112, 112)
    assert FIRST.operations == 2 * 64 * 112 * 112 * 147 == 236_027_904
    assert FIRST.moved(4) == 4 * (3 * 224 * 224 + 64 * 147 + 64 * 112 * 112) == 3_851_008
    assert FIRST.at_batch(32).operations == 32 * 236_027_904
    grouped = ConvCase("", "", (1, 8, 6, 6), (8, 2, 3, 3), padding=1, groups=4)
    assert grouped.operations == 2 * 8 * 36 * 18


def test_resnet_50_has_the_operations_that_are_known_of_it() -> None:
    """4.09 billion multiply-adds, of which 2 million are the last product's."""
    sides = {256: 3, 512: 4, 1024: 6, 2048: 3}
    total = 0
    for case in FAMILIES[0].cases:
        filters, channels = case.weight[:2]
        first = case.stride == 2 or case is FIRST
        width = {64: 256, 128: 512, 256: 1024, 512: 2048}
        if first:
            times = 1
        elif case.weight[2] == 3:
            times = sides[width[filters]] - (filters != 64)
        elif filters > channels:
            # 64 to 256 is both the block's last layer and the shortcut
            times = sides[filters] + (filters == 256)
        else:
            doubles = channels == 2 * filters or (case.x[2] == 56 and channels == filters)
            times = 1 if doubles else sides[channels] - 1
        total += times * case.operations // 2
    assert total == pytest.approx(4.09e9, rel=0.005)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("case", TINY.cases, ids=lambda case: case.name)
def test_the_fast_reference_agrees_with_the_slow_one(
    rng: np.random.Generator, case: ConvCase, mode: str
) -> None:
    x, weight = random_array(rng, case.x, FLOAT32), random_array(rng, case.weight, FLOAT32)
    options: Any = case.geometry
    want = layer_reference(Conv(weight, padding_mode=mode, **options), x, FLOAT32, FLOAT32).value
    got = convolved(case, x.astype(np.float64), weight.astype(np.float64), mode)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


def computed(rng: np.random.Generator, *, integers: bool) -> Computed:
    """A batch of 7 made of 5 samples, computed right."""
    case = TINY.cases[0].at_batch(7)
    make = small_integers if integers else random_array
    base, weight = make(rng, (5, *case.x[1:]), FLOAT32), make(rng, case.weight, FLOAT32)
    y = convolved(case, base.astype(np.float64), weight.astype(np.float64)).astype(np.float32)
    return Computed(case, FLOAT32, base, weight, y[np.arange(7) % 5])


def test_a_right_map_passes_and_a_wrong_element_does_not(
    rng: np.random.Generator, arrays: NumpyArrays
) -> None:
    given = computed(rng, integers=False)
    assert 0 < error_share(arrays, given, "direct") < 0.1
    wrong = given.y.copy()
    wrong[3, 1, 2, 4] += 0.01
    assert error_share(arrays, replace(given, y=wrong), "direct") > 1
    with pytest.raises(Wrong, match="times the bound"):
        demand_bounded(arrays, replace(given, y=wrong), "direct")
    wrong[3, 1, 2, 4] = math.nan
    with pytest.raises(Wrong, match="nan"):
        demand_bounded(arrays, replace(given, y=wrong), "direct")


def test_equal_samples_must_have_equal_maps(rng: np.random.Generator, arrays: NumpyArrays) -> None:
    given = computed(rng, integers=False)
    given.y[6, 0, 0, 0] = np.nextafter(given.y[6, 0, 0, 0], np.float32(9))
    with pytest.raises(Wrong, match="samples 5 to 6"):
        demand_bounded(arrays, given, "direct")


def test_integers_must_be_exact(rng: np.random.Generator, arrays: NumpyArrays) -> None:
    given = computed(rng, integers=True)
    demand_exact(arrays, given)
    given.y[2, 0, 0, 0] += 2.0**-10
    with pytest.raises(Wrong, match="1 of "):
        demand_exact(arrays, given)


def test_copies_fill_the_cache_and_calls_the_time() -> None:
    assert copies_for(10 << 20, 50 << 20) == 13
    assert copies_for(1 << 30, 50 << 20) == 1
    assert copies_for(1, 50 << 20) == MOST_COPIES
    assert copies_for(1, 0) == 1
    assert calls_for(0.005, 1e-4, copies=3) == 50
    assert calls_for(0.005, 1.0, copies=3) == 3
    assert calls_for(0.005, 1e-9, copies=3) == MOST_CALLS
    assert calls_for(0.005, 1.0, copies=1) == 1


class FakeTorch:
    """PyTorch's events and streams: a call takes the device 10 us, and no call waits for the host."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[str] = []
        self.cuda: Any = SimpleNamespace(
            Event=self._event,
            stream=nullcontext,
            synchronize=lambda: self.said.append("synchronize"),
            get_device_properties=self._properties,
            _sleep=self._sleep,
        )

    def _event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def _properties(self, device: object) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1000)

    def _sleep(self, cycles: int) -> None:
        self.said.append("sleep")
        self.now += cycles / 2e9

    def ask(self, piece: int) -> None:
        self.said.append("ask")
        self.now += 1e-5


class FakeEvent:
    def __init__(self, torch: FakeTorch) -> None:
        self.torch, self.at = torch, 0.0

    def record(self, stream: object) -> None:
        self.torch.said.append("record")
        self.at = self.torch.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1e3


def test_the_head_start_is_not_counted() -> None:
    torch = FakeTorch()
    clock = EventClock(torch, SimpleNamespace(device=0), seconds=2e-4)
    assert clock.cache_bytes == 1000
    times = clock.times(torch.ask, copies=4, repeats=3)
    assert times.device == pytest.approx(1e-5)
    assert times.unaided == pytest.approx(1e-5)
    begin = torch.said.index("sleep")
    assert torch.said[begin - 1 : begin + 24] == [
        "synchronize",
        "sleep",
        "record",
        *["ask"] * 20,
        "record",
        "synchronize",
    ]
    assert torch.said.count("sleep") == 3


def test_the_fastest_and_the_slowest_are_kept() -> None:
    torch = FakeTorch()
    clock = EventClock(torch, SimpleNamespace(device=0), seconds=1e-5)
    takes = iter([1.0] * 4 + [3.0, 1.0, 2.0] + [9.0] * 3)

    def ask(piece: int) -> None:
        torch.now += next(takes)

    times = clock.times(ask, copies=1, repeats=3)
    assert (times.fastest, times.device, times.slowest) == pytest.approx((1.0, 2.0, 3.0))
    assert times.unaided == pytest.approx(9.0)


@pytest.fixture
def rig(compiler: Compiler) -> Rig:
    device = EmulatedDevice(compiler)
    stream = device.stream()
    return Rig(device, stream, NumpyArrays(stream), HostClock(stream))


def test_copies_count_the_packed_filters_too(rig: Rig) -> None:
    """Fourier's filters are far larger than the tensors."""
    case = ConvCase("", "", (1, 1, 40, 40), (2, 1, 9, 9), padding=4)
    tensors = tensors_of(rig, case, "float32")
    direct, fourier = (
        LayerOnDevice(rig, case, tensors, precision=Precision.HIGH, algorithm=algorithm, cache_bytes=64_000)
        for algorithm in ("direct", "fourier")
    )
    rows, filters = 4 * 3 * 40 * 40, 4 * 2 * 9 * 9
    assert direct.copies == copies_for(rows + filters, 64_000) == 9
    assert fourier.copies == 2
    alone = LayerOnDevice(rig, case, tensors, precision=Precision.HIGH, algorithm="direct")
    assert alone.copies == 1


class OtherArrays(NumpyArrays):
    """Arrays whose memory another library holds, which a device reads and writes and knows no more of."""

    def held(self, array: Any) -> Held:
        copy = np.array(array)
        memory: Any = SimpleNamespace(address=copy.ctypes.data, nbytes=copy.nbytes, array=copy)
        return Held(copy, memory)

    def read(self, held: Held) -> Any:
        return held.array


def test_transforms_are_measured_on_another_librarys_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuFFT's plans take CuPy's memory alone."""
    fake = FakeCupy(tmp_path)
    monkeypatch.setitem(MODULES, "cupy", fake)
    device = CupyDevice(0, fake.path)
    stream = device.stream()
    rig = Rig(device, stream, OtherArrays(stream), HostClock(stream))
    case = ConvCase("", "", (1, 1, 40, 40), (1, 1, 31, 31), padding=15)
    found = measure(rig, case, "float32", "fourier", tensors_of(rig, case, "float32"))
    assert 0 <= found.error <= 1
    assert found.launches >= 6
    assert found.times is not None


def test_transforms_are_measured_where_they_are_chosen_or_named() -> None:
    assert algorithms_of(["direct", "fourier"], ["all"]) == ["direct"]
    assert algorithms_of(["fourier", "direct"], ["all"]) == ["fourier", "direct"]
    assert algorithms_of(["direct", "fourier"], ["fourier"]) == ["fourier"]
    assert algorithms_of(["direct", "fourier"], ["chosen"]) == ["direct"]
    assert algorithms_of(["direct"], ["winograd"]) == []


@pytest.mark.parametrize(
    ("choice", "library"),
    [
        ("_ConvBackend.Cudnn", "cuDNN"),
        ("_ConvBackend.CudaDepthwise2d", "PyTorch's own"),
        (AttributeError("no such function"), "cuDNN or PyTorch's own"),
    ],
)
def test_whose_kernel_the_peer_takes(choice: Any, library: str) -> None:
    asked: list[Any] = []

    def select(*given: Any) -> Any:
        asked.append(given)
        if isinstance(choice, Exception):
            raise choice
        return choice

    torch = SimpleNamespace(_C=SimpleNamespace(_select_conv_backend=select))
    case = ConvCase("", "", (1, 4, 9, 8), (4, 1, 3, 3), 2, 1, 1, 4)
    assert library_of(torch, case, "x", "w") == library
    assert asked == [("x", "w", None, [2, 2], [1, 1], [1, 1], False, [0, 0], 4, None)]


def test_a_stream_whose_rows_are_wrong_is_not_timed(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmarks.gpu_stream as module

    def wrong(*given: Any) -> Any:
        return convolved(*given) + 1

    monkeypatch.setattr(module, "convolved", wrong)
    with pytest.raises(Wrong, match="first row of image 0"):
        stream_images(EmulatedDevice(compiler), Stretch(images=1, shape=(3, 12, 16), filters=4, repeats=1))


def test_the_digest_follows_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gpu.kernels_digest()
    kernels = list(base.every_kernel())
    monkeypatch.setattr(base, "every_kernel", lambda: iter(kernels[1:]))
    assert gpu.kernels_digest() != before
    monkeypatch.setattr(base, "every_kernel", lambda: iter(kernels[::-1]))
    assert gpu.kernels_digest() == before
