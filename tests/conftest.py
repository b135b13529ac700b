"""Fixtures for the whole suite: every backend that can run here, a server on it, a client.

No test names a backend. The ones tested are those the registry knows; one that cannot run is skipped with
its reason. The environment says more of a run:

- CONVSERVICE_TEST_BACKENDS (names, comma-separated) demands backends instead: one of them that cannot run is
  a failure.
- CONVSERVICE_TEST_NO_SKIPS=1 makes a failure of every test that is skipped, with the reason of the skip.
- HYPOTHESIS_PROFILE chooses how many examples are tried: `ci` (the default, the same ones every time) or
  `thorough` (many, other ones every time).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from convservice.dtypes import DTYPES, FLOAT32, DType
from convservice.errors import BackendUnavailable
from convservice.v1.conv_pb2_grpc import ConvServiceStub
from convservice_backends.interface import Backend
from convservice_backends.registry import Registry
from tests.helpers import held_to_means

if TYPE_CHECKING:
    from convservice import ConvClient
    from convservice_server.server import Server

settings.register_profile(
    "ci",
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("ci"), max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

DEMANDED = tuple(name for name in os.environ.get("CONVSERVICE_TEST_BACKENDS", "").split(",") if name)
TESTED = DEMANDED or Registry().names or ("",)
NO_SKIPS = os.environ.get("CONVSERVICE_TEST_NO_SKIPS") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Makes a failure of a skip, where no test may be skipped."""
    report = yield
    if not hasattr(report, "wasxfail"):
        demand_no_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that is skipped whole."""
    report = yield
    demand_no_skip(report)
    return report


def demand_no_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns the report of a skip into one of a failure, with the reason of the skip."""
    if NO_SKIPS and report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"CONVSERVICE_TEST_NO_SKIPS allows no skip. {reason}"


@pytest.fixture(scope="session", params=TESTED)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, constructed as the server constructs it."""
    with closing(Registry()) as registry:
        try:
            found = registry.resolve(request.param)
        except BackendUnavailable as exc:
            if DEMANDED:
                pytest.fail(f"CONVSERVICE_TEST_BACKENDS demands it: {exc.message}")
            pytest.skip(exc.message)
        yield found


@pytest.fixture(autouse=True)
def within_means(request: pytest.FixtureRequest) -> Iterator[None]:
    """Holds a test to what its backend is for; the marker `multiply_adds` says what it takes."""
    with ExitStack() as stack:
        if "backend" in request.fixturenames:
            marker = request.node.get_closest_marker("multiply_adds")
            wanted = None if marker is None else marker.args[0]
            stack.enter_context(held_to_means(request.getfixturevalue("backend"), wanted))
        yield


@pytest.fixture(scope="session")
def variants(backend: Backend) -> Iterator[tuple[Backend, ...]]:
    """The backend, and beside it the same with 1, 2 and 3 workers where its constructor takes `workers`."""
    kind: Any = type(backend)
    with ExitStack() as stack:
        found = [backend]
        if "workers" in inspect.signature(kind).parameters:
            found += [stack.enter_context(closing(kind(workers=count))) for count in (1, 2, 3)]
        yield tuple(found)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same every time."""
    return np.random.default_rng(20240229)


@pytest.fixture(params=[dtype for dtype in DTYPES if dtype.is_float], ids=str)
def float_dtype(request: pytest.FixtureRequest) -> DType:
    """Each float dtype."""
    found: DType = request.param
    return found


@pytest.fixture(params=DTYPES, ids=str)
def input_dtype(request: pytest.FixtureRequest) -> DType:
    """Each dtype that an input may have."""
    found: DType = request.param
    return found


@pytest.fixture
def weight_dtype(input_dtype: DType) -> DType:
    """The dtype of weights for an input of `input_dtype`: the same, or float32 beside integers."""
    return input_dtype if input_dtype.is_float else FLOAT32


@pytest.fixture(scope="session")
def server(backend: Backend) -> Iterator[Server]:
    """A server in this process on a free port, on each backend in turn."""
    from convservice_server.config import ServerConfig
    from convservice_server.server import Server

    with Server(ServerConfig(listen="127.0.0.1:0", backend=backend.name, log_level="warning")) as found:
        yield found


@pytest.fixture(scope="session")
def target(server: Server) -> str:
    """The server's address."""
    return f"127.0.0.1:{server.port}"


@pytest.fixture(scope="session")
def client(target: str) -> Iterator[ConvClient]:
    """A client of the server."""
    import convservice

    with convservice.connect(target, timeout=60) as found:
        yield found


@pytest.fixture(scope="session")
def stub(target: str) -> Iterator[ConvServiceStub]:
    """The server's calls without the SDK."""
    with grpc.insecure_channel(target) as channel:
        yield ConvServiceStub(channel)
