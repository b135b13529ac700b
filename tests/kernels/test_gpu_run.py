"""The GPU benchmark's program on the emulator: what it keeps, how it ends, how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_run
from benchmarks.gpu_arrays import NumpyArrays
from benchmarks.gpu_cases import TINY, ConvCase
from benchmarks.gpu_check import Wrong
from benchmarks.gpu_clocks import HostClock, Times
from benchmarks.gpu_layers import PRECISIONS, Measured, Rig
from benchmarks.gpu_peer import PeerMeasured
from benchmarks.gpu_report import Report
from benchmarks.gpu_stream import Stretch
from convservice.errors import BackendUnavailable, Reason
from convservice_emulator.build import Compiler


def emulated(path: Path, *options: str) -> list[str]:
    """A command line for a few small layers."""
    return ["--device", "emulator", "--families", "tiny", "--output", str(path), *options]


def test_the_program_on_the_emulator(
    compiler: Compiler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu-emulated"
    assert gpu.main(emulated(path, "--cases", "stride 2|5 dilation")) == 0
    kept = Report.read(path.with_suffix(".json"))
    measured = {(row.case, row.batch, row.precision) for row in kept.rows if row.chosen}
    assert len(measured) == 2 * 2 * 4
    assert all(row.status == "ok" and row.device_us and row.error is not None for row in kept.rows)
    assert all(row.launches and row.peer_us is None for row in kept.rows)
    assert {"depthwise", "direct", "implicit_gemm"} <= {row.algorithm for row in kept.rows}
    assert len(kept.header["kernels"]) == 64
    assert kept.notes == []
    assert [figures["dtype"] for figures in kept.stream] == ["float32", "uint8"]
    assert all(figures["slowest part over whole"] > 0 for figures in kept.stream)
    assert all(figures["kernel launches an image, whole"] >= 1 for figures in kept.stream)
    assert not path.with_suffix(".png").exists()
    said = capsys.readouterr().out
    assert "tiny, 2 to 3, 21, 5 dilation 2, batch 7, bfloat16: direct\n  ok" in said
    assert "stream of images, uint8\n" in said


def test_what_fails_is_noted_and_the_rest_goes_on(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(rig: Any, case: ConvCase, precision: str, algorithm: str, *others: Any, **more: Any) -> Any:
        if algorithm == "direct":
            raise Wrong("by 3 | times")
        raise MemoryError("no more")

    monkeypatch.setattr(gpu_run, "measure", fail)
    path = tmp_path / "gpu-emulated"
    options = ["--no-stream", "--precisions", "float32", "--algorithms", "direct,implicit_gemm"]
    assert gpu.main(emulated(path, *options)) == 1
    kept = Report.read(path.with_suffix(".json"))
    assert {row.status for row in kept.rows if row.algorithm == "direct"} == {"wrong: by 3 | times"}
    assert {row.status for row in kept.rows if row.algorithm != "direct"} == {"failed: MemoryError: no more"}
    assert len(kept.rows) == 2 * len(TINY.cases) * len(TINY.batches)
    assert kept.notes == []


def test_tensors_that_cannot_be_made_are_noted(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(gpu_run, "tensors_of", fail)
    path = tmp_path / "gpu-emulated"
    assert gpu.main(emulated(path, "--only-validate", "--no-stream", "--cases", "1x1", "--batches", "1")) == 1
    rows = Report.read(path.with_suffix(".json")).rows
    assert [(row.algorithm, row.status) for row in rows] == [
        ("tensors", "failed: MemoryError: no more")
    ] * len(PRECISIONS)


def test_when_time_is_up_what_is_left_out_is_said(compiler: Compiler, tmp_path: Path) -> None:
    path = tmp_path / "gpu-emulated"
    assert gpu.main(emulated(path, "--no-stream", "--minutes", "-1")) == 0
    assert Report.read(path.with_suffix(".json")).notes == [
        "48 of 48 convolutions that were asked for, each in one precision"
    ]


FEW = (
    "--no-stream",
    "--only-validate",
    "--precisions",
    "float32",
    "--batches",
    "1",
    "--algorithms",
    "chosen",
)
"""The six small layers, once each."""


def measure_until(name: str, last: Callable[[Rig], None]) -> Callable[..., Any]:
    """A stand-in for `measure` that does something else at one case."""

    def stand_in(rig: Rig, case: ConvCase, *others: Any, **more: Any) -> Measured:
        if case.name == name:
            last(rig)
        return Measured(0.5, 1, None)

    return stand_in


def die(rig: Any) -> None:
    rig.device.fail("it fell off the bus")
    raise BackendUnavailable("lost", reason=Reason.DEVICE_LOST)


def refuse(rig: Rig) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Killed(BaseException):
    """Ends the program where it is, as a signal does."""


def kill(rig: Rig) -> None:
    raise Killed


def interrupt(rig: Rig) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("last", "why"),
    [(die, "it fell off the bus"), (refuse, "CUDA error: an illegal memory access was encountered")],
)
def test_a_device_that_fails_for_good_ends_the_run(  # noqa: PLR0917 - fixtures, and two parameters
    compiler: Compiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last: Callable[[Rig], None],
    why: str,
) -> None:
    path = tmp_path / "gpu-emulated"
    third = TINY.cases[2].name
    with monkeypatch.context() as patch:
        patch.setattr(gpu_run, "measure", measure_until(third, last))
        assert gpu.main(emulated(path, *FEW)) == 1
    kept = Report.read(path.with_suffix(".json"))
    assert [row.case for row in kept.rows] == [case.name for case in TINY.cases[:3]]
    assert [row.status.split(":")[0] for row in kept.rows] == ["ok", "ok", "failed"]
    assert kept.notes == ["4 of 6 convolutions that were asked for, each in one precision"]
    said = capsys.readouterr()
    assert f"the device has failed for good: {why}" in said.err
    assert f"--resume {path}.json" in said.err
    monkeypatch.setattr(gpu_run, "measure", measure_until("", last))
    assert gpu.main(emulated(path, *FEW, "--resume", f"{path}.json")) == 1
    again = Report.read(path.with_suffix(".json"))
    assert again.rows[:3] == kept.rows
    assert [row.case for row in again.rows] == [case.name for case in TINY.cases]
    assert again.notes == []


def test_a_run_that_is_killed_has_what_it_had_and_goes_on_behind_it(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu-emulated"
    with monkeypatch.context() as patch:
        patch.setattr(gpu_run, "measure", measure_until(TINY.cases[1].name, kill))
        with pytest.raises(Killed):
            gpu.main(emulated(path, *FEW))
    assert capsys.readouterr().out.splitlines()[-1].startswith("tiny, 16 to 24, 6x7, 1x1, batch 1, float32: ")
    kept = Report.read(path.with_suffix(".json"))
    assert [row.status for row in kept.rows] == ["ok", "under way"]
    assert kept.notes == ["5 of 6 convolutions that were asked for, each in one precision"]
    monkeypatch.setattr(gpu_run, "measure", measure_until(TINY.cases[1].name, kill))
    few = [option for option in FEW if option != "--no-stream"]
    resumes = ["--device", "emulator", "--families", "tiny", *few, "--resume", f"{path}.json"]
    assert gpu.main(resumes) == 1
    again = Report.read(path.with_suffix(".json"))
    assert [row.status for row in again.rows] == ["ok", "crashed or hung", *["ok"] * 4]
    assert [figures["dtype"] for figures in again.stream] == ["float32", "uint8"]
    assert "| crashed or hung |" in path.with_suffix(".md").read_text()


def test_who_ends_a_run_loses_no_row(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu-emulated"
    monkeypatch.setattr(gpu_run, "measure", measure_until(TINY.cases[1].name, interrupt))
    with pytest.raises(KeyboardInterrupt):
        gpu.main(emulated(path, *FEW))
    assert [row.status for row in Report.read(path.with_suffix(".json")).rows] == ["ok"]


def test_the_stream_alone_and_what_was_streamed_before(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sent = tmp_path / "gpu-emulated", list[str]()

    def stream(device: Any, stretch: Stretch) -> dict[str, Any]:
        sent.append(stretch.dtype)
        if len(sent) == 2:
            raise RuntimeError("CUDA error: unspecified | launch failure")
        return {"images a second": 2.0}

    monkeypatch.setattr(gpu_run, "stream_images", stream)
    assert gpu.main(emulated(path, "--only-stream")) == 1
    kept = Report.read(path.with_suffix(".json"))
    assert (kept.rows, sent) == ([], ["float32", "uint8"])
    assert kept.stream[0] == {"dtype": "float32", "images a second": 2.0}
    assert kept.stream[1]["status"].startswith("failed: RuntimeError: CUDA error")
    assert gpu.main(emulated(path, "--only-stream", "--resume", f"{path}.json")) == 1
    assert len(sent) == 2
    assert Report.read(path.with_suffix(".json")).stream == kept.stream


def test_the_peer_is_measured_in_both_layouts_once(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []

    def peer(rig: Rig, case: ConvCase, precision: str, tensors: Any, layout: str) -> PeerMeasured:
        asked.append((len(case.x) - 2, layout))
        if layout == "channels_last" and len(case.x) == 5:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        us = 4e-6 if layout == "contiguous" else 3e-6
        return PeerMeasured("cuDNN", us, Times(us, us, us, us, us))

    def with_peer(backend: Any) -> Rig:
        device = backend.contexts[0].device
        stream = device.stream()
        return Rig(device, stream, NumpyArrays(stream), HostClock(stream), HostClock(stream))

    monkeypatch.setattr(gpu_run, "measure_peer", peer)
    monkeypatch.setattr(gpu, "emulated_rig", with_peer)
    path = tmp_path / "gpu-emulated"
    options = ["--no-stream", "--precisions", "float32", "--cases", "^2 to", "--batches", "1"]
    assert gpu.main(emulated(path, *options, "--algorithms", "chosen")) == 1
    assert asked == [(1, "contiguous"), (3, "contiguous"), (3, "channels_last")]
    kept = Report.read(path.with_suffix(".json"))
    line, refused, solid = kept.rows
    assert line.peers == {
        "peer": "cuDNN",
        "peer_us": pytest.approx(4.0),
        "peer_channels_last": None,
        "peer_channels_last_us": None,
        "peer_error": 4e-6,
    }
    assert (refused.algorithm, refused.chosen) == ("cuDNN, channels_last", False)
    assert refused.status == "failed: RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"
    assert solid.status == "ok"
    assert solid.peer_us == line.peer_us
    assert gpu.main(emulated(path, *options, "--resume", f"{path}.json")) == 1
    assert len(asked) == 3
    again = Report.read(path.with_suffix(".json"))
    assert {row.peer_us for row in again.rows if row.status == "ok"} == {line.peer_us}


def test_chosen_algorithms_are_measured_more_often(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated: dict[bool, set[int]] = {True: set(), False: set()}

    def stand_in(rig: Rig, case: ConvCase, precision: str, algorithm: str, *others: Any, repeats: int) -> Any:
        repeated[algorithm == "depthwise"].add(repeats)
        return Measured(0.5, 1, None)

    monkeypatch.setattr(gpu_run, "measure", stand_in)
    options = ["--no-stream", "--precisions", "float32", "--cases", "in 4 groups"]
    assert gpu.main(emulated(tmp_path / "gpu-emulated", *options)) == 0
    assert repeated == {True: {7}, False: {3}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--algorithms", "direct,magic"], "there is no 'magic': all, chosen, or some of fourier"),
        (["--algorithms", "chosen,direct"], "there is no 'chosen'"),
        (["--cases", "no such name"], "leave no case"),
        (["--batches", "3"], "leave no case"),
        (["--no-stream", "--only-stream"], "not allowed with"),
        (["--resume", "nowhere.json"], "nowhere.json"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    compiler: Compiler, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(emulated(tmp_path / "gpu-emulated", *options))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_kept_table_is_written_by_who_goes_on_with_it_alone(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_run, "measure", measure_until("", kill))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    options = ["--device", "emulator", "--families", "tiny", *FEW]
    assert gpu.main(options) == 0
    kept = (tmp_path / "gpu-emulated.json").read_bytes()
    with pytest.raises(SystemExit):
        gpu.main(options)
    assert "gpu-emulated.json is there already: go on with it (--resume)" in capsys.readouterr().err
    assert (tmp_path / "gpu-emulated.json").read_bytes() == kept
    assert gpu.main([*options, "--resume", str(tmp_path / "gpu-emulated.json")]) == 0
    other = tmp_path / "other"
    given = ["--resume", str(tmp_path / "gpu-emulated.json"), "--output", str(other)]
    assert gpu.main([*options, *given]) == 0
    assert Report.read(other.with_suffix(".json")).rows == Report.read(tmp_path / "gpu-emulated.json").rows


def test_a_result_of_other_kernels_is_not_gone_on_with(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_run, "measure", measure_until("", kill))
    path = tmp_path / "gpu-emulated"
    assert gpu.main(emulated(path, *FEW)) == 0
    monkeypatch.setattr(gpu, "kernels_digest", lambda: "others")
    with pytest.raises(SystemExit):
        gpu.main(emulated(path, *FEW, "--resume", f"{path}.json"))
    assert "and is others here" in capsys.readouterr().err
