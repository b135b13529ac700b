"""The suite of backends once more for each CUDA algorithm, taken wherever it fits, on the emulator.

The suite itself runs what is chosen for each layer, which never is `direct` and seldom another. Each run is a
process of its own, whose environment names the algorithm, as users may.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convservice.dtypes import FLOAT32
from convservice.layers import Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms import NAMES, VARIABLE
from convservice_emulator.backend import EmulatorBackend
from convservice_emulator.build import Compiler
from tests.helpers import random_array, run, spec_of

ROOT = Path(__file__).parents[2]
REFERENCE, INVARIANCE = "tests/backends/test_against_reference.py", "tests/backends/test_invariance.py"

RUNS = {
    "direct": "",
    "implicit_gemm": "",
    "tensor_core": "reference or fast or float16",
    "winograd": "fast",  # it computes nothing else
    "fourier": "reference or 1-D",  # elsewhere most of a tile lies beside these maps: minutes
    "depthwise": "reference",  # it is what is chosen for most other layers
}
"""Algorithm to which of the tests it runs, all where empty: those in which it computes what others do in the
suite itself."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", RUNS)
def test_the_suite_with_one_algorithm(compiler: Compiler, algorithm: str) -> None:
    environment = {**os.environ, VARIABLE: algorithm, "CONVSERVICE_TEST_BACKENDS": EmulatorBackend.name}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", RUNS[algorithm]]
    done = subprocess.run(
        [*command, REFERENCE, INVARIANCE],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_every_algorithm_has_its_run() -> None:
    assert set(RUNS) == set(NAMES)


LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "depthwise": ((6, 1, 3, 3), (2, 6, 9, 7), {"groups": 6}),
    "fourier": ((3, 2, 5, 5), (2, 2, 90, 300), {"padding": 2}),  # several batches of tiles
    "implicit_gemm": ((4, 300, 3, 3), (1, 300, 8, 8), {}),  # a sum in several parts
}
"""Weight, input and options of a layer that an algorithm takes; the others' is `OTHERWISE`."""

OTHERWISE = ((20, 24, 3, 3), (2, 24, 9, 7), {"padding": 1})


@pytest.mark.parametrize("algorithm", NAMES)
def test_the_environment_names_an_algorithm_and_its_work_is_counted_once(
    compiler: Compiler, algorithm: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setenv(VARIABLE, algorithm)
    weight, shape, options = LAYERS.get(algorithm, OTHERWISE)
    layer, x = Conv(random_array(rng, weight, FLOAT32), **options), random_array(rng, shape, FLOAT32)
    backend = EmulatorBackend()
    prepared = backend.prepare(Network([layer]), Precision.FAST)
    assert set(prepared.plan(spec_of(x)).algorithms.values()) == {algorithm}
    before = backend.multiply_adds
    found = run(prepared, x)["output"]
    assert backend.multiply_adds - before == found.size * np.prod(weight[1:])
