"""The marker by which a test says how much it asks of its backend."""

from __future__ import annotations

import pytest

from convservice_backends.interface import Backend

MANY = 10**15


@pytest.mark.multiply_adds(MANY)
def test_a_large_test_runs_only_where_the_backend_takes_it(backend: Backend) -> None:
    assert getattr(backend, "most_multiply_adds", MANY) >= MANY
