"""From the targets that a caller names to the addresses of single servers.

Given an endpoint's targets, `Directory` hands on one `Address` per server: a name behind which there are
several servers becomes their addresses, anything else stays as it is named, and gRPC resolves it. Names are
looked up in a thread of its own, again when that is asked for (a connection failed) or after half a minute,
so that only a client's first call ever waits for it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

FRESH_SECONDS = 30.0
"""Names are looked up again when what is known of them is older and they are used."""

PAUSE_SECONDS = 1.0
"""Names are looked up no more often, however often that is asked for."""

FIRST_SECONDS = 5.0
"""A client's first call waits so long for its names, and then leaves them to gRPC."""

_NAME = re.compile(r"(?:dns:(?:///)?)?(?P<host>[\w.-]+):(?P<port>\d+)")


@dataclass(frozen=True)
class Address:
    """Where one server is.

    Attributes:
        target: what gRPC dials.
        authority: the `HOST:PORT` that was named, which the server's certificate must be for; None where
            that is the target itself.
    """

    target: str
    authority: str | None = None


def look_up(host: str, port: int) -> list[str]:
    """The addresses behind a name, as `ADDRESS:PORT`, of one family: that which has more of them.

    A server that has an address of each family is one server, not two.

    Raises:
        OSError: the name does not resolve.
    """
    families: dict[int, dict[str, None]] = {socket.AF_INET: {}, socket.AF_INET6: {}}
    for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if family == socket.AF_INET:
            families[family][f"{where[0]}:{port}"] = None
        elif family == socket.AF_INET6:
            families[family][f"[{where[0]}]:{port}"] = None
    first, second = families.values()
    return list(first if len(first) >= len(second) else second)


def name_in(target: str) -> tuple[str, int] | None:
    """Host and port of a target behind whose name there may be several servers; None for any other.

    Not looked up here are addresses, this machine, gRPC targets of other kinds, and what is reached through
    a proxy, which then looks it up.
    """
    found = _NAME.fullmatch(target)
    if found is None or found["host"] in {"localhost", "unix"} or _is_address(found["host"]):
        return None
    return None if _proxied(found["host"]) else (found["host"], int(found["port"]))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _proxied(host: str) -> bool:
    """Whether gRPC would dial a name through an HTTP proxy that the environment names."""
    if not any(os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        return False
    names = ("no_grpc_proxy", "no_proxy")  # gRPC reads them in lower case alone
    exempt = next((value for name in names if (value := os.environ.get(name))), "")
    return not any(host.endswith(entry.strip()) for entry in exempt.split(",") if entry.strip())


class Directory:
    """The addresses behind an endpoint's targets.

    Args:
        targets: as they are named.
        clock: seconds, never going back.
    """

    def __init__(self, targets: tuple[str, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._names = {target: name for target in targets if (name := name_in(target)) is not None}
        self._found: dict[str, tuple[Address, ...]] = {target: (Address(target),) for target in targets}
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()  # guards what follows, and `_found`
        self._looking = False
        self._looked_at: float | None = None
        self._listeners: list[Callable[[], None]] = []
        self._known = threading.Event()
        if not self._names:
            self._known.set()

    def after_fork(self) -> None:
        """Forgets, in a forked child, the thread and the lock, which belong to its parent."""
        self._reset()

    @property
    def named(self) -> bool:
        """Whether there are names to look up, which may lead to other servers later."""
        return bool(self._names)

    @property
    def known(self) -> bool:
        """Whether every name has been looked up."""
        return self._known.is_set()

    def wait(self, timeout: float | None) -> None:
        """Waits until every name has been looked up once; no longer than `FIRST_SECONDS`."""
        if not self.known:
            self.refresh()
            self._known.wait(FIRST_SECONDS if timeout is None else min(timeout, FIRST_SECONDS))

    def addresses(self) -> tuple[Address, ...]:
        """One address per server, as far as is known at the moment; never waits."""
        if self._names and self._age() > FRESH_SECONDS:
            self.refresh()
        return tuple(dict.fromkeys(address for found in self._found.values() for address in found))

    def refresh(self) -> None:
        """Has the names looked up again soon, unless that is being done or has just been."""
        if not self._names or self._age() < PAUSE_SECONDS:
            return
        with self._lock:
            if self._looking:
                return
            self._looking = True
        threading.Thread(target=self._look, name="convservice-addresses", daemon=True).start()

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Has `listener` called, from another thread, whenever names have been looked up."""
        with self._lock:
            self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[], None]) -> None:
        """Ends what `subscribe` began."""
        with self._lock:
            self._listeners.remove(listener)

    def _age(self) -> float:
        looked_at = self._looked_at
        return FRESH_SECONDS + 1 if looked_at is None else self._clock() - looked_at

    def _look(self) -> None:
        found = {target: self._behind(target, *name) for target, name in self._names.items()}
        with self._lock:
            self._found = self._found | found
            self._looked_at = self._clock()
            self._looking = False
            listeners = tuple(self._listeners)
        self._known.set()
        for listener in listeners:
            listener()

    def _behind(self, target: str, host: str, port: int) -> tuple[Address, ...]:
        """The servers behind a name: those known before where it does not resolve now."""
        try:
            found = look_up(host, port)
        except (OSError, UnicodeError):
            return self._found[target]
        if len(found) < 2:
            return (Address(target),)
        return tuple(Address(address, f"{host}:{port}") for address in sorted(found))
