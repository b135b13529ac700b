from __future__ import annotations

import threading
from typing import ClassVar

import pytest

from convservice.errors import BackendUnavailable, Reason
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.interface import Backend, Description, PreparedNetwork
from convservice_backends.registry import Registry


class Fake:
    """A backend that computes nothing and remembers whether it was closed."""

    name: ClassVar[str] = "fake"
    made: ClassVar[int] = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.closed = False
        self.failure = ""

    def describe(self) -> Description:
        return Description("a device")

    def prepare(self, network: Network, precision: Precision) -> PreparedNetwork:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


class Other(Fake):
    name: ClassVar[str] = "other"


def cannot() -> Backend:
    raise BackendUnavailable("no device of that kind", reason=Reason.BACKEND_UNAVAILABLE)


def breaks() -> Backend:
    raise OSError("libsomething.so is missing")


def test_a_backend_is_constructed_once_and_closed() -> None:
    Fake.made = 0
    registry = Registry(factories={"fake": Fake})
    threads = [threading.Thread(target=registry.resolve, args=("fake",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = registry.resolve("fake")
    assert isinstance(found, Fake)
    assert Fake.made == 1
    registry.close()
    assert found.closed


def test_a_backend_that_is_slow_to_construct_holds_up_no_other() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> Backend:
        begun.set()
        assert go_on.wait(30)
        return Other()

    registry = Registry(factories={"fake": Fake, "slow": slow})
    waiting = threading.Thread(target=registry.resolve, args=("slow",))
    waiting.start()
    assert begun.wait(30)
    assert registry.resolve("fake").name == "fake"
    registry.review()
    assert waiting.is_alive(), "nobody waited for it"
    go_on.set()
    waiting.join()
    assert isinstance(registry.resolve("slow"), Other)


def test_auto_takes_the_first_that_works_and_keeps_each_reason() -> None:
    registry = Registry(factories={"a": cannot, "b": breaks, "other": Other})
    assert registry.resolve().name == "other"
    assert registry.resolve("auto").name == "other"
    statuses = {status.name: status for status in registry.statuses()}
    assert statuses["a"].reason == "backend 'a' cannot run here: no device of that kind"
    assert statuses["b"].reason == "backend 'b' cannot run here: OSError: libsomething.so is missing"
    assert (statuses["other"].reason, statuses["other"].is_default) == ("", True)
    assert statuses["other"].description == Description("a device")
    assert not statuses["a"].is_default


def test_a_default_may_be_named() -> None:
    registry = Registry("fake", {"fake": Fake, "another": Other})
    assert registry.resolve().name == "fake"
    assert [status.name for status in registry.statuses() if status.is_default] == ["fake"]


def test_what_cannot_run_is_refused_with_its_reason() -> None:
    registry = Registry(factories={"a": cannot, "fake": Fake})
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="no device of that kind") as caught:
            registry.resolve("a")
        assert (caught.value.reason, caught.value.metadata["backend"]) == ("BACKEND_UNAVAILABLE", "a")
    with pytest.raises(BackendUnavailable, match="no backend 'tpu'; known are a, fake") as caught:
        registry.resolve("tpu")
    assert caught.value.field == "backend"


def test_without_any_backend_every_reason_is_given() -> None:
    with pytest.raises(
        BackendUnavailable, match=r"no backend can run here: a: .*no device.*; b: .*libsomething"
    ):
        Registry(factories={"a": cannot, "b": breaks}).resolve()
    with pytest.raises(BackendUnavailable, match="none is installed"):
        Registry(factories={}).resolve()


def test_the_installed_backends_are_known() -> None:
    assert Registry().names
