"""Names to backends, with the reason where one cannot run.

Backends are found by name in the entry-point group `convservice.backends`, so that anybody can add one. A
backend is imported and constructed when it is first asked for; a refusal is kept with its reason.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from convservice.errors import BackendUnavailable, Reason
from convservice_backends.interface import Backend, Description

GROUP = "convservice.backends"
AUTO = "auto"
PREFERENCE = ("cupy", "numpy")
"""The order in which `auto` tries; names that are not here come last, in alphabetical order."""

log = logging.getLogger(__name__)

Factory = Callable[[], Backend]

Watcher = Callable[[str, bool], None]
"""Told a backend's name, and whether it serves."""

Trial = Callable[[Backend], None]
"""Raises what is wrong with a backend that was just constructed."""


def _nobody(name: str, serves: bool) -> None:
    """The watcher of a registry that nobody watches."""


def _no_trial(backend: Backend) -> None:
    """The trial of a registry that takes every backend that can be constructed."""


@dataclass(frozen=True)
class Status:
    """Whether a backend can run here.

    Attributes:
        name: its name.
        reason: why it cannot; empty when it can.
        is_default: whether it is what an unnamed request gets.
        description: what it computes on; None when it cannot run.
    """

    name: str
    reason: str
    is_default: bool
    description: Description | None


@dataclass
class _Place:
    """A name's backend, or why there is none; neither until it was first asked for."""

    factory: Factory
    # Guards the fields below, and is held while the backend is constructed, which may take long.
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: Backend | None = None
    refused: str = ""
    failed: bool = False


class Registry:
    """The backends of one process, each constructed at most once.

    Args:
        default: the backend for requests that name none; `"auto"` takes the first that works.
        factories: name to constructor; those of the entry-point group when not given.
        trial: a backend that it raises for cannot run here.
    """

    def __init__(
        self,
        default: str = AUTO,
        factories: Mapping[str, Factory] | None = None,
        trial: Trial = _no_trial,
    ) -> None:
        found = _installed() if factories is None else factories
        self._trial = trial
        self._places = {name: _Place(factory) for name, factory in found.items()}
        self._default = default
        self._watcher: Watcher = _nobody

    def watch(self, watcher: Watcher) -> None:
        """Has `watcher` called with a backend's name: with True when it was constructed, with False when it
        was found to have failed for good. Whatever was constructed before is told at once."""
        self._watcher = watcher
        for name, place in self._places.items():
            with place.lock:
                made = place.made is not None and not place.failed
            if made:
                watcher(name, True)

    def review(self) -> None:
        """Looks for backends that have failed for good, and tells the watcher."""
        for name, place in self._places.items():
            made = place.made  # without its lock, which is held as long as a backend is being constructed
            if made is not None and made.failure:
                self._fail(name, place, made.failure)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name known, in the order of preference."""
        known = [name for name in PREFERENCE if name in self._places]
        return (*known, *sorted(set(self._places) - set(known)))

    def resolve(self, name: str = "") -> Backend:
        """The backend of that name; of the default's for an empty name or `"auto"`.

        Raises:
            BackendUnavailable: there is none of that name, or it cannot run here; the message says why.
        """
        wanted = name or self._default
        if wanted != AUTO:
            return self._get(wanted)
        refused: dict[str, str] = {}
        for candidate in self.names:
            try:
                return self._get(candidate)
            except BackendUnavailable as exc:
                refused[candidate] = exc.message
        reasons = "; ".join(f"{known}: {reason}" for known, reason in sorted(refused.items()))
        raise BackendUnavailable(
            f"no backend can run here: {reasons or 'none is installed'}",
            reason=Reason.BACKEND_UNAVAILABLE,
        )

    def constructed(self) -> dict[str, Backend | None]:
        """Each name's backend; None for one that cannot run here or was never asked for."""
        return {name: self._places[name].made for name in self.names}

    def statuses(self) -> tuple[Status, ...]:
        """Every backend, tried, with the reason where it cannot run."""
        try:
            default = self.resolve().name
        except BackendUnavailable:
            default = ""
        found: list[Status] = []
        for name in self.names:
            try:
                found.append(Status(name, "", name == default, self._get(name).describe()))
            except BackendUnavailable as exc:
                found.append(Status(name, exc.message, False, None))
        return tuple(found)

    def close(self) -> None:
        """Closes every backend that was constructed."""
        for place in self._places.values():
            with place.lock:
                made, place.made = place.made, None
            if made is not None:
                try:
                    made.close()
                except Exception:  # a third party's may raise anything; the others are closed all the same
                    log.exception("backend %r could not be closed", made.name)

    def _get(self, name: str) -> Backend:
        place = self._places.get(name)
        if place is None:
            raise self._unavailable(
                name, f"there is no backend {name!r}; known are {', '.join(self.names) or 'none'}"
            )
        with place.lock:
            is_new = place.made is None and not place.refused
            if is_new:
                _construct(name, place, self._trial)
            made, refused = place.made, place.refused
        if made is None:
            raise self._unavailable(name, refused)
        if is_new:
            self._watcher(name, True)
            with place.lock:
                failed = place.failed
            if failed:  # found out by another thread, and told, in between
                self._watcher(name, False)
        if made.failure:
            self._fail(name, place, made.failure)
            raise self._unavailable(name, f"backend {name!r} is out of service: {made.failure}")
        return made

    def _fail(self, name: str, place: _Place, why: str) -> None:
        with place.lock:
            known, place.failed = place.failed, True
        if not known:
            log.error("backend %r is out of service: %s", name, why)
            self._watcher(name, False)

    def _unavailable(self, name: str, why: str) -> BackendUnavailable:
        return BackendUnavailable(
            why,
            reason=Reason.BACKEND_UNAVAILABLE,
            metadata={"backend": name, "known": ", ".join(self.names)},
            field="backend",
        )


def _construct(name: str, place: _Place, trial: Trial) -> None:
    """Makes a place's backend, or notes why there is none; called with the place's lock held."""
    try:
        made = place.factory()
        try:
            trial(made)
        except BaseException:
            made.close()
            raise
        place.made = made
    except BackendUnavailable as exc:
        place.refused = f"backend {name!r} cannot run here: {exc.message}"
    except Exception as exc:  # noqa: BLE001 - a third party's constructor may raise anything; it is kept as the reason
        place.refused = f"backend {name!r} cannot run here: {type(exc).__name__}: {exc}"
    if place.refused:
        log.info("%s", place.refused)


def _installed() -> dict[str, Factory]:
    def factory_of(name: str) -> Factory:
        def make() -> Backend:
            (entry,) = entry_points(group=GROUP, name=name)
            made = entry.load()()
            if not isinstance(made, Backend):
                raise TypeError(f"{entry.value} is no Backend")
            return made

        return make

    return {entry.name: factory_of(entry.name) for entry in entry_points(group=GROUP)}
