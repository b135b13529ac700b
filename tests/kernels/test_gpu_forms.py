"""Every kernel form once: the problems that launch them, their program on the emulator, tools/test-gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import gpu_forms, gpu_others, gpu_problems
from benchmarks.gpu_arrays import convolved
from benchmarks.gpu_check import Wrong
from benchmarks.gpu_exact import Exact, exact
from benchmarks.gpu_other_cases import CASES, TINY
from convservice.dtypes import FLOAT32, dtype_of
from convservice.errors import BackendUnavailable, Reason
from convservice.layers import Conv, Layer
from convservice.wire.enums import Precision
from convservice_emulator.backend import EmulatorBackend
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("architecture", [75, 80, 90, 120])
def test_some_problem_launches_every_form(architecture: int) -> None:
    found, missing = gpu_problems.problems(replace(INFO, architecture=architecture))
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
    monkeypatch.setattr(gpu_problems, "CASES", gpu_problems.CASES[:1])
    assert gpu_forms.main(["--device", "emulator", "--only", "^depthwise_float32_7x7"]) == 1
    assert "no problem of the list launches depthwise_float32_7x7" in capsys.readouterr().out


def test_tensor_cores_are_given_sums_that_are_not_split() -> None:
    """As one part a sum of 4096 products has the errors that a sum of so many may have."""
    for given in (dtype_of("float16"), dtype_of("bfloat16")):
        case = gpu_forms.LONG_SUM
        problem = gpu_problems.Problem(case, "tensor_core", given, FLOAT32, Precision.HIGH, 1)
        layer = Conv(np.ones(case.weight, given.numpy))
        launched = gpu_problems.launched(problem, layer, INFO)
        assert [kernel.file for kernel in launched] == ["tensor_core"]
        assert "fold" not in next(iter(launched)).name


def test_tensor_cores_are_tried_with_sums_of_small_products(
    compiler: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_forms.main(["--device", "emulator", "--only", "4095 products just below"]) == 0
    said = capsys.readouterr().out
    assert "4 problems, 0 of them wrong" in said
    assert "tensor_core, 1 and 4095 products just below 2**-24, bfloat16\n" in said


def test_an_adder_that_cuts_off_twice_as_much_breaks_the_bound(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = EmulatedDevice(compiler)
    half, stream = dtype_of("float16"), device.stream()

    def of_ones(problem: Any, x: Any, *others: Any) -> Any:
        return "tensor_core", np.ones(problem.case.y, np.float32)

    monkeypatch.setattr(gpu_forms, "_computed", of_ones)
    assert 0.99 < gpu_forms.check_long_sum(half, -24, stream, device.info) <= 1
    with pytest.raises(Wrong, match="an error is 2 times"):
        gpu_forms.check_long_sum(half, -23, stream, device.info)


def test_a_device_that_fails_for_good_ends_the_forms(
    compiler: Compiler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = EmulatorBackend()

    def check(kernel: Any, stream: Any) -> None:
        device: Any = backend.contexts[0].device
        device.fail("it fell off the bus")
        raise BackendUnavailable("lost", reason=Reason.DEVICE_LOST)

    def backend_of(device: str) -> EmulatorBackend:
        return backend

    monkeypatch.setattr(gpu_forms, "backend_of", backend_of)
    monkeypatch.setattr(gpu_forms, "check_elementwise", check)
    assert gpu_forms.main(["--device", "emulator", "--only", "^elementwise"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("elementwise_")
    assert lines[2] == "the device has failed for good: it fell off the bus"
    assert lines[3].startswith("1 problems, 1 of them wrong")


def script(*parts: str, path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs tools/test-gpu with this Python, and what is in a folder before what is on the path."""
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(path)} | settings
    environment["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    command = [str(ROOT / "tools" / "test-gpu"), *parts]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder with a compute-sanitizer that only runs the program, and a CuPy with cuFFT and no device."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    (tmp_path / "cupy" / "cuda").mkdir(parents=True)
    (tmp_path / "cupy" / "__init__.py").write_text("from cupy import cuda\n")
    (tmp_path / "cupy" / "cuda" / "__init__.py").write_text(RUNTIME)
    (tmp_path / "cupy" / "cuda" / "cufft.py").touch()
    return tmp_path


RUNTIME = """
class runtime:
    CUDARuntimeError = RuntimeError
    getDeviceCount = staticmethod(lambda: 0)
"""


SANITIZER = """#!/bin/sh
echo "$@"
while [ "$1" != "$PYTHON" ]; do shift; done
[ -z "$FAIL" ] || exit 9
exec "$@"
"""

FEW_FORMS = "--device emulator --only ^elementwise_copy"


def test_the_script_runs_parts_and_says_how_they_ended(compiler: Compiler, stand_ins: Path) -> None:
    done = script("forms", "sanitize", path=stand_ins, FORMS_ARGS=FEW_FORMS, SANITIZERS="memcheck racecheck")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("4 problems, 0 of them wrong") == 3
    memcheck, racecheck = (line for line in done.stdout.splitlines() if line.startswith("--tool "))
    assert memcheck.startswith("--tool memcheck --report-api-errors no --error-exitcode 9 ")
    assert "--only ^(?!fourier) --device emulator --only ^elementwise" in racecheck
    assert "fourier" not in memcheck
    assert done.stdout.count(" passed ") == 3
    done = script("sanitize", path=stand_ins, FORMS_ARGS=FEW_FORMS, SANITIZERS="memcheck", FAIL="yes")
    assert done.returncode == 1
    assert "failed: sanitize memcheck;" in done.stdout


def test_the_script_knows_its_parts(stand_ins: Path) -> None:
    done = script("speed", path=stand_ins)
    assert done.returncode == 2
    assert "there is no part speed" in done.stderr


def test_the_script_wants_cufft(stand_ins: Path) -> None:
    (stand_ins / "cupy" / "cuda" / "cufft.py").write_text("raise ImportError('no libcufft.so.12')")
    done = script("forms", path=stand_ins)
    assert done.returncode == 1
    assert "has no cuFFT that CuPy could load: no libcufft.so.12" in done.stderr


def test_without_a_gpu_the_suite_fails_and_does_not_skip(stand_ins: Path) -> None:
    arguments = "-x -k test_worked_example"
    done = script(
        *("suite", "algorithms"),
        path=stand_ins,
        PYTEST_ARGS=arguments,
        ALGORITHMS="winograd",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 1
    assert done.stdout.count("CONVSERVICE_TEST_BACKENDS demands it") >= 2
    assert "failed: suite; algorithm winograd;" in done.stdout


def test_layers_beside_the_convolution_are_measured(
    compiler: Compiler, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--device", "emulator", "--cases", f"^{TINY}", "--batches", "3", "--precisions", "float16"]
    assert gpu_others.main([*options, "--output", str(tmp_path / "others")]) == 0
    table = (tmp_path / "others.md").read_text()
    assert [line for line in capsys.readouterr().out.splitlines() if line not in table] == []
    names = [case.name for case in CASES if case.name.startswith(TINY)]
    assert names
    assert all(f"| {name} | 3 | float16 | 0." in table for name in names)


def test_a_layer_that_computes_something_else_is_not_timed(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(layer: Layer, inputs: Sequence[NDArray[Any]]) -> Exact:
        found = exact(layer, inputs)
        return replace(found, value=found.value + 1)

    monkeypatch.setattr(gpu_others, "exact", wrong)
    options = ["--device", "emulator", "--cases", "tiny max", "--batches", "1", "--precisions", "float32"]
    assert gpu_others.main([*options, "--output", str(tmp_path / "others")]) == 1
    assert "| wrong: " in (tmp_path / "others.md").read_text()
