"""The suite's own promise: a backend that a run demands and that cannot run here is a failure, not a skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("demanded", ["no-such-backend", ""])
def test_a_demanded_backend_must_run(demanded: str) -> None:
    environment = {**os.environ, "CONVSERVICE_TEST_BACKENDS": demanded}
    test = "tests/backends/test_worked_example.py::test_the_neurons_of_a_deeper_network"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if demanded:
        assert done.returncode == 1, done.stdout
        assert "CONVSERVICE_TEST_BACKENDS demands it: there is no backend 'no-such-backend'" in done.stdout
    else:
        assert done.returncode == 0, done.stdout
