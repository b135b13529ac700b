"""The invariance tests once more under the kernels that the BLAS library has for other processors.

The kernels are chosen when the library is loaded, so each choice is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convservice_backends.registry import Registry, Status

NEEDS = {
    "Haswell": {"avx2", "fma"},
    "SkylakeX": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "Prescott": {"pni"},  # SSE3
}
# OpenBLAS uses one set for all processors before AVX and reports it by the first name that has it.
ALSO_CALLED = {"Prescott": "Katmai"}
CHOSEN = (
    "import numpy, threadpoolctl; print(*{i.get('architecture') for i in threadpoolctl.threadpool_info()})"
)
HERE = Path(__file__).parent


def processor_flags() -> set[str]:
    """What the processor can do, as Linux names it; empty where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}


def calls_blas(status: Status) -> bool:
    """Whether a backend can run here, and its bits depend on a BLAS library."""
    return status.description is not None and "blas" in status.description.versions


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kernels", NEEDS)
def test_invariance_with_the_kernels_of_another_processor(kernels: str) -> None:
    if missing := NEEDS[kernels] - processor_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}, which the {kernels} kernels need")
    calling = [status.name for status in Registry().statuses() if calls_blas(status)]
    if not calling:
        pytest.skip("no backend that can run here calls a BLAS library")
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernels, "CONVSERVICE_TEST_BACKENDS": ",".join(calling)}
    chosen = subprocess.run(
        [sys.executable, "-c", CHOSEN], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    if not {kernels, ALSO_CALLED.get(kernels)} & set(chosen):
        pytest.skip(f"NumPy's BLAS here has no {kernels} kernels; asked for them it takes {chosen}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(HERE / "test_invariance.py"),
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
