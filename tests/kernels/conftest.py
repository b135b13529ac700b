"""Fixtures for tests of kernels: the emulator's compiler, and the sanitizers that it may have."""

from __future__ import annotations

import os

import pytest

from convservice.errors import BackendUnavailable
from convservice_emulator.build import Compiler
from convservice_emulator.sanitizers import Kind, Sanitizer


@pytest.fixture(scope="session")
def compiler() -> Compiler:
    """The emulator's compiler."""
    try:
        return Compiler()
    except BackendUnavailable as exc:
        if "emulator" in os.environ.get("CONVSERVICE_TEST_BACKENDS", ""):
            pytest.fail(f"CONVSERVICE_TEST_BACKENDS demands the emulator: {exc.message}")
        pytest.skip(f"the emulator cannot run here: {exc.message}")


@pytest.fixture(scope="session", params=[Kind.ADDRESS, Kind.THREAD], ids=lambda kind: kind.value)
def sanitizer(request: pytest.FixtureRequest, compiler: Compiler) -> Sanitizer:
    """Each sanitizer that works here."""
    found = Sanitizer(compiler, request.param)
    if why := found.missing():
        pytest.skip(why)
    return found


@pytest.fixture(scope="session")
def sanitizers(compiler: Compiler) -> tuple[Sanitizer, ...]:
    """No sanitizer, and then all, which must all work here."""
    found = tuple(Sanitizer(compiler, kind) for kind in (Kind.PLAIN, Kind.THREAD, Kind.ADDRESS))
    for each in found:
        if why := each.missing():
            pytest.skip(why)
    return found
