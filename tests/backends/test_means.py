"""What the suite promises of itself: a test stays within what its backend is for, and no skip goes unseen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convservice.layers import Conv
from convservice.network import Network
from convservice_backends.interface import Backend
from tests.helpers import CountsWork, compute, held_to_means

ROOT = Path(__file__).parents[2]


class Counting:
    """What stands for a backend that is for tests of 100 multiply-adds."""

    name = "counting"
    most_multiply_adds = 100
    multiply_adds = 7


@pytest.mark.parametrize(("wanted", "done"), [(None, 0), (None, 100), (100, 100), (20, 20), (100, 0)])
def test_within_its_means_a_test_runs(wanted: int | None, done: int) -> None:
    backend = Counting()
    with held_to_means(backend, wanted):
        backend.multiply_adds += done


@pytest.mark.parametrize(("wanted", "done", "allowed"), [(None, 101, 100), (20, 21, 20)])
def test_a_test_may_not_do_more_than_it_says(wanted: int | None, done: int, allowed: int) -> None:
    backend = Counting()
    message = f"it took {done} multiply-adds of backend 'counting', and may take {allowed}: make it smaller"
    with pytest.raises(pytest.fail.Exception, match=message), held_to_means(backend, wanted):
        backend.multiply_adds += done


def test_a_test_that_says_it_is_too_large_does_not_begin() -> None:
    message = "it takes 101 multiply-adds; backend 'counting' is for tests of at most 100"
    with pytest.raises(pytest.skip.Exception, match=message), held_to_means(Counting(), 101):
        pytest.fail("it has begun")


def test_a_backend_that_does_not_count_takes_any() -> None:
    with held_to_means(object(), 10**15):
        pass


def test_a_backend_that_counts_counts_every_product(backend: Backend) -> None:
    network = Network([Conv(np.ones((6, 2, 3, 3), np.float32), groups=2)])
    x = np.ones((2, 4, 12, 9), np.float32)
    before = backend.multiply_adds if isinstance(backend, CountsWork) else 0
    compute(backend, network, x)
    if isinstance(backend, CountsWork):
        assert backend.multiply_adds - before == 2 * 6 * (10 * 7) * (2 * 9)


SUITE = """
import pytest
from tests.backends.test_means import Counting

@pytest.fixture(scope="session")
def backend():
    return Counting()

@pytest.mark.multiply_adds(101)
def test_too_large_and_says_so(backend):
    raise AssertionError

def test_too_large(backend):
    backend.multiply_adds += 101

def test_right(backend):
    backend.multiply_adds += 100

@pytest.mark.xfail(reason="known")
def test_known():
    raise AssertionError
"""
SKIPPED_WHOLE = "import pytest\npytest.importorskip('no_such_module', reason='there is no such module')\n"


@pytest.mark.parametrize("no_skips", ["", "1"])
def test_a_run_says_what_was_too_large_and_may_demand_that_nothing_is_skipped(
    no_skips: str, tmp_path: Path
) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "test_skipped.py").write_text(SKIPPED_WHOLE)
    settings = ["-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, "--continue-on-collection-errors", str(tmp_path)],
        env={**os.environ, "CONVSERVICE_TEST_NO_SKIPS": no_skips},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "it took 101 multiply-adds of backend 'counting', and may take 100: make it smaller" in done.stdout
    too_large = "it takes 101 multiply-adds; backend 'counting' is for tests of at most 100"
    for reason in (too_large, "there is no such module"):
        assert reason in done.stdout
        assert (f"allows no skip. Skipped: {reason}" in done.stdout) == bool(no_skips)
    counts = "2 passed, 1 xfailed, 3 errors" if no_skips else "2 passed, 2 skipped, 1 xfailed, 1 error"
    assert counts in done.stdout
