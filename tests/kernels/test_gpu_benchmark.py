"""The GPU benchmark where there is no GPU: what it counts, checks, writes, draws; its programs, emulated."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, gpu_forms
from benchmarks.gpu_arrays import NumpyArrays, convolved
from benchmarks.gpu_cases import FAMILIES, TINY, ConvCase
from benchmarks.gpu_check import Computed, Wrong, demand_exact, error_share
from benchmarks.gpu_clocks import MOST_CALLS, MOST_COPIES, EventClock, calls_for, copies_for
from benchmarks.gpu_peaks import peaks_of
from benchmarks.gpu_plot import draw
from benchmarks.gpu_stream import Stretch, stream_images
from benchmarks.gpu_table import Report, Row, geometric_mean, markdown, ratios
from convservice.dtypes import FLOAT32
from convservice.layers import Conv
from convservice_backends.cuda.algorithms import base
from convservice_backends.reference import layer_reference
from convservice_emulator.backend import EmulatorBackend
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from tests.helpers import random_array, small_integers

ROOT = Path(__file__).parents[2]
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
    with pytest.raises(Wrong, match="times the bound"):
        error_share(arrays, replace(given, y=wrong), "direct")
    wrong[3, 1, 2, 4] = math.nan
    with pytest.raises(Wrong, match="nan"):
        error_share(arrays, replace(given, y=wrong), "direct")


def test_equal_samples_must_have_equal_maps(rng: np.random.Generator, arrays: NumpyArrays) -> None:
    given = computed(rng, integers=False)
    given.y[6, 0, 0, 0] = np.nextafter(given.y[6, 0, 0, 0], np.float32(9))
    with pytest.raises(Wrong, match="samples 5 to 6"):
        error_share(arrays, given, "direct")


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
    clock = EventClock(torch, SimpleNamespace(device=0), seconds=2e-4, repeats=3)
    assert clock.cache_bytes == 1000
    times = clock.times(torch.ask, copies=4)
    assert times.device == pytest.approx(1e-5)
    assert times.unaided == pytest.approx(1e-5)
    assert times.idle == pytest.approx(0)
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


def test_a_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean(iter([0.25])) == pytest.approx(0.25)
    assert geometric_mean([]) is None


def report() -> Report:
    """Made-up figures, for tests of the writers alone."""
    rows: list[Row] = []
    for family in ("first family", "second family"):
        for batch in (1, 8):
            for precision in ("float32", "float16"):
                row = Row(family, "a layer", batch, precision, "direct", True, "ok", 10**9, 10**6)
                timed = replace(row, error=0.25, launches=2, device_us=100.0, host_us=7.0, unaided_us=125.0)
                rows += [
                    replace(timed, peer_us=50.0 * batch),
                    replace(row, chosen=False, status="wrong: by 3"),
                ]
    return Report({"device": "NVIDIA H100 80GB HBM3", "date": "TEST, not measured"}, rows)


def test_rates_and_shares_of_a_row() -> None:
    row = report().rows[0]
    peaks = peaks_of("NVIDIA H100 80GB HBM3")
    assert row.teraflops == pytest.approx(10.0)
    assert row.gigabytes == pytest.approx(10.0)
    assert row.ratio == pytest.approx(0.5)
    assert row.idle == pytest.approx(0.2)
    assert not row.bound_by_memory(peaks)
    assert replace(row, nbytes=10**9).bound_by_memory(peaks)
    assert ratios(report(), "first family", "float32") == [0.5, 4.0]
    assert ratios(report(), None, "float32", batch=1) == [0.5, 0.5]


def test_the_table_says_what_was_measured() -> None:
    text = "\n".join(markdown(report()))
    assert "- device: NVIDIA H100 80GB HBM3" in text
    assert "| all | all | 1.41 (4) | 1.41 (4) |" in text
    assert "| first family | 8 | 4.00 (1) | 4.00 (1) |" in text
    assert (
        "| a layer | 1 | **direct** | 0.250 | 100.0 | 10.00 | 15% | 10 | 50.0 | 0.50 |  | 2 | 7.0 | 20% |"
        in text
    )
    assert "| a layer | 1 | direct | wrong: by 3 |" in text
    tables = [line for line in text.splitlines() if line.startswith("| a layer")]
    assert {line.count("|") for line in tables} == {15}


def test_what_is_written_can_be_read_and_drawn_again(tmp_path: Path) -> None:
    kept = report()
    kept.write(tmp_path / "gpu-test")
    again = Report.read(tmp_path / "gpu-test.json")
    assert again == kept
    draw(again, tmp_path / "plot.png", title="TEST: made-up figures, nothing was measured")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert gpu.main(["--plot", str(tmp_path / "gpu-test.json")]) == 0
    assert (tmp_path / "gpu-test.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no ratio"):
        draw(Report({}), tmp_path / "none.png")


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA L4", 300),
        ("Tesla T4", 320),
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA L40S", None),
        ("emulated", None),
    ],
)
def test_peaks_are_found_by_a_devices_name(name: str, bandwidth: float | None) -> None:
    found = peaks_of(name)
    assert (found.bandwidth if found else None) == bandwidth


def test_a_file_is_named_after_the_device() -> None:
    assert gpu.model_of("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu.model_of("NVIDIA GeForce RTX 4090") == "rtx-4090"


def test_the_program_on_the_emulator(compiler: Compiler, tmp_path: Path) -> None:
    path = tmp_path / "gpu-emulated"
    options = ["--device", "emulator", "--families", "tiny", "--cases", "stride 2|5 dilation"]
    assert gpu.main([*options, "--output", str(path)]) == 0
    kept = Report.read(path.with_suffix(".json"))
    measured = {(row.case, row.batch, row.precision) for row in kept.rows if row.chosen}
    assert len(measured) == 2 * 2 * 4
    assert all(row.status == "ok" and row.device_us and row.error is not None for row in kept.rows)
    assert all(row.launches and row.peer_us is None for row in kept.rows)
    assert {"depthwise", "direct", "implicit_gemm"} <= {row.algorithm for row in kept.rows}
    assert len(kept.header["kernels"]) == 64
    assert [figures["images"].split()[-1] for figures in kept.stream] == ["float32", "uint8"]
    assert all(figures["slowest part over whole"] > 0 for figures in kept.stream)
    assert not path.with_suffix(".png").exists()


def test_what_fails_is_noted_and_the_rest_goes_on(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(rig: Any, case: ConvCase, precision: str, algorithm: str, *others: Any, **more: Any) -> Any:
        if algorithm == "direct":
            raise Wrong("by 3 | times")
        raise MemoryError("no more")

    monkeypatch.setattr(gpu, "measure", measure)
    path = tmp_path / "gpu-emulated"
    options = ["--device", "emulator", "--families", "tiny", "--no-stream", "--precisions", "float32"]
    assert gpu.main([*options, "--algorithms", "direct,implicit_gemm", "--output", str(path)]) == 1
    rows = Report.read(path.with_suffix(".json")).rows
    assert {row.status for row in rows if row.algorithm == "direct"} == {"wrong: by 3 / times"}
    assert {row.status for row in rows if row.algorithm != "direct"} == {"failed: MemoryError: no more"}
    assert len(rows) == 2 * len(TINY.cases) * len(TINY.batches)
    assert json.loads(path.with_suffix(".json").read_text())["notes"] == []


def test_when_time_is_up_what_is_left_out_is_said(compiler: Compiler, tmp_path: Path) -> None:
    path = tmp_path / "gpu-emulated"
    options = ["--device", "emulator", "--families", "tiny", "--no-stream", "--minutes", "-1"]
    assert gpu.main([*options, "--output", str(path)]) == 0
    assert Report.read(path.with_suffix(".json")).notes == [
        "48 cases, for which the -1 minutes did not suffice"
    ]


def test_a_stream_whose_rows_are_wrong_is_not_timed(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmarks.gpu_stream as module

    def wrong(*given: Any) -> Any:
        return convolved(*given) + 1

    monkeypatch.setattr(module, "convolved", wrong)
    with pytest.raises(Wrong, match="first row of image 0"):
        stream_images(EmulatorBackend(), Stretch(images=1, shape=(3, 12, 16), filters=4, repeats=1))


def test_the_digest_follows_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gpu.kernels_digest()
    kernels = list(base.every_kernel())
    monkeypatch.setattr(base, "every_kernel", lambda: iter(kernels[1:]))
    assert gpu.kernels_digest() != before
    monkeypatch.setattr(base, "every_kernel", lambda: iter(kernels[::-1]))
    assert gpu.kernels_digest() == before


@pytest.mark.parametrize("architecture", [75, 80, 90, 120])
def test_some_problem_launches_every_form(architecture: int) -> None:
    found, missing = gpu_forms.problems(replace(INFO, architecture=architecture))
    assert not missing, sorted(kernel.name for kernel in missing)
    assert {problem.algorithm for problem in found} >= {"direct", "depthwise", "implicit_gemm"}


def test_forms_are_validated(compiler: Compiler, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_forms.main(["--device", "emulator", "--only", "^(direct|elementwise)"]) == 0
    assert ", 0 of them wrong" in capsys.readouterr().out


def test_a_form_that_computes_something_else_is_found(
    compiler: Compiler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*given: Any) -> Any:
        return convolved(*given) * 1.001

    monkeypatch.setattr(gpu_forms, "convolved", wrong)
    assert gpu_forms.main(["--device", "emulator", "--only", "^direct.*float32.*zeros"]) == 1
    assert "times the bound" in capsys.readouterr().out


def test_a_form_that_no_problem_launches_is_an_error(
    compiler: Compiler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_forms, "CASES", gpu_forms.CASES[:1])
    assert gpu_forms.main(["--device", "emulator", "--only", "^depthwise_float32_7x7"]) == 1
    assert "no problem of the list launches depthwise_float32_7x7" in capsys.readouterr().out


def script(*parts: str, path: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs tools/test-gpu with this Python."""
    search = os.environ["PATH"] if path is None else f"{path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHON": sys.executable, "PATH": search} | settings
    command = [str(ROOT / "tools" / "test-gpu"), *parts]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


STAND_IN = """#!/bin/sh
echo "$1 $2"
while [ "$1" != "$PYTHON" ]; do shift; done
[ -z "$FAIL" ] || exit 9
exec "$@"
"""

FEW = "--device emulator --only ^elementwise_copy"


def test_the_script_runs_parts_and_says_how_they_ended(compiler: Compiler, tmp_path: Path) -> None:
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    done = script("forms", "sanitize", path=tmp_path, FORMS_ARGS=FEW, SANITIZERS="memcheck racecheck")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("4 problems, 0 of them wrong") == 3
    assert "--tool racecheck" in done.stdout
    assert done.stdout.count(" passed ") == 3
    done = script("sanitize", path=tmp_path, FORMS_ARGS=FEW, SANITIZERS="memcheck", FAIL="yes")
    assert done.returncode == 1
    assert "failed: sanitize memcheck;" in done.stdout


def test_the_script_knows_its_parts() -> None:
    done = script("speed")
    assert done.returncode == 2
    assert "there is no part speed" in done.stderr


def test_without_a_gpu_the_suite_fails_and_does_not_skip(tmp_path: Path) -> None:
    done = script("suite", PYTEST_ARGS="-x -k test_worked_example", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "CONVSERVICE_TEST_BACKENDS demands it" in done.stdout
