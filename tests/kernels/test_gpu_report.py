"""What the GPU benchmark keeps, goes on with, writes and draws, from made-up figures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu, gpu_report
from benchmarks.gpu_clocks import Times
from benchmarks.gpu_device import VISIBLE, backend_of, driver_state, lost
from benchmarks.gpu_peaks import measured_peaks, peaks_of
from benchmarks.gpu_plot import draw, drawn
from benchmarks.gpu_report import CRASHED, UNDER_WAY, Report, Row, geometric_mean, ratios, resumed
from benchmarks.gpu_table import markdown, means, write
from convservice_emulator.build import Compiler
from convservice_emulator.device import EmulatedDevice

HEADER = {
    "device": "NVIDIA H100 80GB HBM3",
    "versions": "numpy 2",
    "kernels": "ab",
    "date": "TEST, not measured",
}


def report() -> Report:
    """Made-up figures, for tests of the writers alone."""
    rows: list[Row] = []
    for family in ("first family", "second family"):
        for batch in (1, 8):
            for precision in ("float32", "float16"):
                row = Row(family, "a layer", batch, precision, "direct", True, "ok", 10**9, 10**6)
                timed = replace(row, error=0.25, launches=2, device_us=100.0, host_us=7.0, unaided_us=125.0)
                timed = replace(timed, fastest_us=99.0, slowest_us=104.0, peer="cuDNN", peer_us=50.0 * batch)
                timed = replace(timed, peer_channels_last="cuDNN", peer_channels_last_us=100.0)
                rows += [
                    replace(timed, peer_error=0.125),
                    replace(row, algorithm="winograd", chosen=False, status="wrong: by 3"),
                ]
    return Report(dict(HEADER), rows, peaks={"float32": 40.0, "memory": 3000.0})


def test_a_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean(iter([0.25])) == pytest.approx(0.25)
    assert geometric_mean([]) is None


def test_rates_and_shares_of_a_row() -> None:
    row = report().rows[0]
    peaks = peaks_of("NVIDIA H100 80GB HBM3")
    assert row.teraflops == pytest.approx(10.0)
    assert row.gigabytes == pytest.approx(10.0)
    assert row.ratio == pytest.approx(0.5)
    assert row.channels_last_ratio == pytest.approx(1.0)
    assert row.idle == pytest.approx(0.2)
    assert row.spread == pytest.approx(0.05)
    assert not row.bound_by_memory(peaks)
    assert replace(row, nbytes=10**9).bound_by_memory(peaks)


def test_the_better_of_two_layouts_is_the_faster_one() -> None:
    one, eight = (
        row for row in report().rows if row.chosen and row.place[::3] == ("first family", "float32")
    )
    assert (one.best_ratio, eight.best_ratio) == (0.5, 1.0)
    assert replace(one, peer_channels_last_us=None).best_ratio == 0.5
    assert replace(one, peer_us=None).best_ratio == 1.0
    assert replace(one, peer_us=None, peer_channels_last_us=None).best_ratio is None
    assert ratios(report(), "first family", "float32") == [0.5, 4.0]
    assert ratios(report(), None, "float32", batch=1) == [0.5, 0.5]
    assert ratios(report(), None, "float32", best=True) == [0.5, 1.0, 0.5, 1.0]


def test_the_table_says_what_was_measured() -> None:
    text = "\n".join(markdown(report()))
    assert "- device: NVIDIA H100 80GB HBM3" in text
    assert "- peaks by datasheet: float32 66.9 TFLOP/s, float16 989.4 TFLOP/s" in text
    assert "- peaks measured: float32 40 TFLOP/s, memory 3000 GB/s" in text
    same, best = text.split("## Ratio to cuDNN")[1:]
    assert "| all | all | 1.41 (4) | 1.41 (4) |" in same
    assert "| first family | 8 | 4.00 (1) | 4.00 (1) |" in same
    assert "| all | all | 0.71 (4) | 0.71 (4) |" in best
    assert "| first family | 8 | 1.00 (1) | 1.00 (1) |" in best
    assert (
        "| a layer | 1 | **direct** | 0.250 | 100.0 | 5% | 10.00 | 15% / 25% | 10 | 50.0 | 0.125 | 0.50"
        " | 1.00 | 2 | 7.0 | 20% |" in text
    )
    assert "| 1% / - |" in text
    assert "| a layer | 1 | winograd | wrong: by 3 |" in text
    tables = [line for line in text.splitlines() if line.startswith("| a layer")]
    assert {line.count("|") for line in tables} == {17}


def test_a_kernel_of_pytorchs_own_is_no_cudnn() -> None:
    made = report()
    made.rows[0] = replace(made.rows[0], peer="PyTorch's own")
    text = "\n".join(markdown(made))
    assert "| 50.0 (PyTorch's own) |" in text


def test_bars_in_a_status_do_not_split_a_cell() -> None:
    made = report()
    made.rows[1] = replace(made.rows[1], status="wrong: |x| is 3")
    made.stream = [{"dtype": "uint8", "status": "failed: X | y"}]
    text = "\n".join(markdown(made))
    assert "| wrong: \\|x\\| is 3 |" in text
    assert "| status | failed: X \\| y |" in text


def test_the_means_are_printed_for_both() -> None:
    first, second = means(report())
    assert first == (
        "ratio to cuDNN, float32, geometric means: 1.41 on the same tensors,"
        " 0.71 to the better of its two layouts"
    )
    assert second.startswith("ratio to cuDNN, float16")
    assert list(means(Report({}))) == []


def test_what_is_written_can_be_read_and_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = report()
    kept.stream = [{"dtype": "uint8", "whole, ms": 2.5}]
    write(kept, tmp_path / "gpu-test")
    again = Report.read(tmp_path / "gpu-test.json")
    assert again == kept
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-test.json", "gpu-test.md"}
    draw(again, tmp_path / "plot.png", title="TEST: made-up figures, nothing was measured")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert gpu.main(["--plot", str(tmp_path / "gpu-test.json")]) == 0
    assert (tmp_path / "gpu-test.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no ratio"):
        draw(Report({}), tmp_path / "none.png")


def test_a_plot_without_chosen_rows_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = report()
    made.rows = [replace(row, chosen=False) for row in made.rows]
    assert not drawn(made)
    write(made, tmp_path / "gpu-test")
    assert gpu.main(["--plot", str(tmp_path / "gpu-test.json")]) == 1
    assert "no ratio to cuDNN to draw" in capsys.readouterr().err


def test_a_write_that_is_cut_short_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = report()
    kept.keep(tmp_path / "gpu-test")

    def full(path: Path, *given: Any, **options: Any) -> int:
        path.write_bytes(b"{")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        Report(HEADER).keep(tmp_path / "gpu-test")
    assert Report.read(tmp_path / "gpu-test.json") == kept


def test_what_was_under_way_is_gone_on_with_as_crashed(tmp_path: Path) -> None:
    kept = report()
    kept.rows[-1] = replace(kept.rows[-1], status=UNDER_WAY)
    kept.stream = [{"dtype": "float32", "images a second": 3.0}, {"dtype": "uint8", "status": UNDER_WAY}]
    kept.notes = ["3 of 9"]
    kept.keep(tmp_path / "gpu-test")
    header = HEADER | {"date": "later"}
    again = resumed([tmp_path / "gpu-test.json"], header)
    assert again.header == header
    assert again.rows[:-1] == kept.rows[:-1]
    assert again.rows[-1] == replace(kept.rows[-1], status=CRASHED)
    assert again.stream == [
        {"dtype": "float32", "images a second": 3.0},
        {"dtype": "uint8", "status": CRASHED},
    ]
    assert (again.notes, again.peaks) == ([], kept.peaks)


@pytest.mark.parametrize("name", gpu_report.SAME)
def test_what_was_measured_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    kept = report()
    kept.header[name] = "another"
    kept.keep(tmp_path / "gpu-test")
    with pytest.raises(ValueError, match=f"{name} was another, and is {HEADER[name]} here"):
        resumed([tmp_path / "gpu-test.json"], HEADER)


def test_of_two_kept_results_the_first_counts(tmp_path: Path) -> None:
    first, second = report(), report()
    first.rows = [replace(row, device_us=1.0) for row in first.rows[:3]]
    first.keep(tmp_path / "first")
    second.keep(tmp_path / "second")
    again = resumed([tmp_path / "first.json", tmp_path / "second.json"], HEADER)
    assert again.rows == [*first.rows, *second.rows[3:]]


def test_rows_that_were_only_validated_are_timed_after_all(tmp_path: Path) -> None:
    kept = report()
    kept.rows[0] = replace(kept.rows[0], device_us=None)
    kept.keep(tmp_path / "gpu-test")
    assert resumed([tmp_path / "gpu-test.json"], HEADER).rows == kept.rows[1:]
    assert resumed([tmp_path / "gpu-test.json"], HEADER, timed=False).rows == kept.rows


def test_a_file_has_a_row_on_a_line(tmp_path: Path) -> None:
    report().keep(tmp_path / "gpu-test")
    lines = (tmp_path / "gpu-test.json").read_text().splitlines()
    assert json.loads(lines[6].removesuffix(","))["case"] == "a layer"


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


class FakeTensors:
    """PyTorch with its tensors, as far as peaks are measured; remembers which products might use TF32."""

    device = "fake"

    def __init__(self) -> None:
        self.torch = self
        self.settings = SimpleNamespace(allow_tf32=True)
        self.backends = SimpleNamespace(cuda=SimpleNamespace(matmul=self.settings))
        self.products: list[tuple[str, bool]] = []
        self.float32, self.bfloat16, self.uint8 = "float32", "bfloat16", "uint8"
        self.kind = ""

    def randn(self, *shape: int, device: str) -> FakeTensors:
        assert (shape, device) == ((10, 10), "fake")
        return self

    def to(self, kind: str) -> FakeTensors:
        self.kind = kind
        return self

    def empty_like(self, other: object) -> FakeTensors:
        return self

    def zeros(self, nbytes: int, *, dtype: str, device: str) -> FakeTensors:
        assert (nbytes, dtype) == (6000, "uint8")
        return self

    def matmul(self, a: object, b: object, *, out: object) -> None:
        self.products.append((self.kind, self.settings.allow_tf32))

    def copy_(self, other: object) -> None:
        pass


class FakeClock:
    cache_bytes = 0

    def times(self, ask: Callable[[int], None], copies: int, repeats: int = 7) -> Times:
        ask(0)
        return Times(9.0, 9.0, 9.0, 1e-6, 9.0)


def test_peaks_are_measured() -> None:
    fake: Any = FakeTensors()
    dtypes = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16"}
    found = measured_peaks(fake, FakeClock(), dtypes, side=10, nbytes=6000)
    assert found == pytest.approx(dict.fromkeys(dtypes, 2e-3) | {"memory": 12.0})
    assert fake.products == [("float32", False), ("float32", True), ("bfloat16", False)]


def test_a_file_is_named_after_the_device() -> None:
    assert gpu.model_of("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu.model_of("NVIDIA GeForce RTX 4090") == "rtx-4090"


def nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_the_drivers_state_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    nvidia_smi(tmp_path, '[ "$1" = --id=0000:17:00.0 ] && echo "580.65.06, 345 MHz, 1980 MHz, 700.00 W"')
    assert driver_state("0000:17:00.0") == (
        "driver 580.65.06, SM clock 345 MHz, at most 1980 MHz, power limit 700.00 W"
    )
    nvidia_smi(tmp_path, "echo No devices were found; exit 6")
    assert driver_state("0").startswith("nvidia-smi does not say: ")
    nvidia_smi(tmp_path, "echo something else")
    assert driver_state("0") == "something else"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert driver_state("0") == "there is no nvidia-smi here"


def test_which_errors_a_device_does_not_survive(compiler: Compiler) -> None:
    device = EmulatedDevice(compiler)
    assert lost(device, RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")) == ""
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert lost(device, illegal) == str(illegal)
    device.fail("it fell off the bus")
    assert lost(device, ValueError("anything")) == "it fell off the bus"


def test_one_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convservice_backends.cupy.backend.CupyBackend", object)
    for given, taken in (("3,1", "3"), ("", "")):
        monkeypatch.setenv(VISIBLE, given)
        backend_of("cupy")
        assert os.environ[VISIBLE] == taken
    monkeypatch.delenv(VISIBLE)
    backend_of("cupy")
    assert os.environ[VISIBLE] == "0"
