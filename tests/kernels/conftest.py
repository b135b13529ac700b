"""Fixtures for tests of kernels: the emulator's compiler, and the sanitizers that it may have."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from convservice.errors import BackendUnavailable
from convservice_emulator.build import Compiler
from convservice_emulator.sanitizers import Kind, Sanitizer


def missing(why: str) -> NoReturn:
    """Skips what cannot run here; where the emulator is demanded, fails."""
    if "emulator" in os.environ.get("CONVSERVICE_TEST_BACKENDS", ""):
        pytest.fail(f"CONVSERVICE_TEST_BACKENDS demands the emulator: {why}")
    pytest.skip(why)


@pytest.fixture(scope="session")
def compiler() -> Compiler:
    """The emulator's compiler."""
    try:
        return Compiler()
    except BackendUnavailable as exc:
        missing(f"the emulator cannot run here: {exc.message}")


@pytest.fixture(scope="session", params=[Kind.ADDRESS, Kind.THREAD], ids=lambda kind: kind.value)
def sanitizer(request: pytest.FixtureRequest, compiler: Compiler) -> Sanitizer:
    """Each sanitizer."""
    return working(Sanitizer(compiler, request.param))


@pytest.fixture(scope="session")
def sanitizers(compiler: Compiler) -> tuple[Sanitizer, ...]:
    """No sanitizer, and then all."""
    return tuple(working(Sanitizer(compiler, kind)) for kind in (Kind.PLAIN, Kind.THREAD, Kind.ADDRESS))


def working(sanitizer: Sanitizer) -> Sanitizer:
    """A sanitizer that works here."""
    if why := sanitizer.missing():
        missing(why)
    return sanitizer
