"""One run of the GPU benchmark: case by case, each row kept as soon as it is there.

A `Course` is given a rig, a report (perhaps gone on with) and what is asked for, and fills the report. What
fails becomes a row, and the next follows; what crashes or hangs the process is left in the file as under
way. After an error that a device does not survive, nothing further can be measured: `Lost` says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu_arrays import TorchArrays
from benchmarks.gpu_cases import FAMILIES, TINY, ConvCase, Family
from benchmarks.gpu_check import Wrong
from benchmarks.gpu_clocks import FEWER_REPEATS, REPEATS
from benchmarks.gpu_device import lost
from benchmarks.gpu_layers import PRECISIONS, Rig, Tensors, fitting, measure, tensors_of
from benchmarks.gpu_peaks import measured_peaks
from benchmarks.gpu_peer import CHANNELS_LAST, CONTIGUOUS, measure_peer
from benchmarks.gpu_report import OK, UNDER_WAY, Report, Row
from benchmarks.gpu_stream import Stretch, stream_images
from benchmarks.gpu_table import figure, write
from convservice.dtypes import dtype_of

T = TypeVar("T")

ALL, CHOSEN = "all", "chosen"

TENSORS = "tensors"
"""What stands for the algorithm where a case's tensors could not be made."""


class Lost(Exception):
    """The device answers nothing more; says why."""


def cases_of(options: argparse.Namespace) -> Iterator[ConvCase]:
    """The cases that are asked for."""
    families: tuple[Family, ...] = FAMILIES
    if options.families:
        families = tuple(family for family in (*FAMILIES, TINY) if family.name in options.families)
    for family in families:
        for batch in family.batches:
            if options.batches and batch not in options.batches:
                continue
            for case in family.cases:
                if options.cases is None or options.cases.search(case.name):
                    yield case.at_batch(batch)


def algorithms_of(fit: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The algorithms to measure.

    Args:
        fit: those that fit a case, the chosen one first.
        wanted: "all" or "chosen", or names.
    """
    if ALL in wanted:
        # Transforms are chosen wherever they pay; elsewhere they take long and say nothing.
        return [name for name in fit if name != "fourier" or name == fit[0]]
    return list(fit[:1]) if CHOSEN in wanted else [name for name in fit if name in wanted]


class Course:
    """See the module.

    Args:
        rig: what is measured on.
        report: to be filled; what is in it is not measured again.
        options: the command line's.
        path: of the kept files, without suffix.
    """

    def __init__(self, rig: Rig, report: Report, options: argparse.Namespace, path: Path) -> None:
        self._rig = rig
        self._report = report
        self._options = options
        self._path = path

    def peaks(self) -> None:
        """Measures what the device can do at best.

        Raises:
            Lost: the device answers nothing more.
        """
        arrays, clock, known = self._rig.arrays, self._rig.peer_clock, self._report.peaks
        dtypes = {name: PRECISIONS[name][0] for name in self._options.precisions if name not in known}
        if not dtypes or clock is None or not isinstance(arrays, TorchArrays):
            return
        print("products of large matrices, and a copy", flush=True)
        try:
            known |= measured_peaks(arrays, clock, dtypes)
        except Exception as exc:  # noqa: BLE001 - what is a share of it is left out, no more
            print(f"  {_why(exc)}", flush=True)
            self._stop_if_lost(exc)

    def cases(self) -> None:
        """Measures every case in every precision, until the time is up.

        Raises:
            Lost: the device answers nothing more.
        """
        until = time.monotonic() + 60 * self._options.minutes
        options = self._options
        pairs = [(case, precision) for case in cases_of(options) for precision in options.precisions]
        for done, (case, precision) in enumerate(pairs):
            self._note_left(len(pairs) - done, len(pairs))
            if time.monotonic() > until:
                break
            self._case(case, precision)
            write(self._report, self._path)
        else:
            self._note_left(0, len(pairs))
        write(self._report, self._path)

    def stream(self, stretches: Sequence[Stretch]) -> None:
        """Streams images.

        Raises:
            Lost: the device answers nothing more.
        """
        for stretch in stretches:
            kept = self._report.stream
            if any(figures["dtype"] == stretch.dtype for figures in kept):
                continue
            print(f"stream of images, {stretch.dtype}", flush=True)
            kept.append({"dtype": stretch.dtype, "status": UNDER_WAY})
            self._report.keep(self._path)
            try:
                self._rig.arrays.tidy(0)
                kept[-1] = {"dtype": stretch.dtype, **stream_images(self._rig.device, stretch)}
            except Exception as exc:  # noqa: BLE001 - one stretch's failure must not take the other along
                kept[-1] = {"dtype": stretch.dtype, "status": _why(exc)}
                self._stop_if_lost(exc)
            finally:
                if kept[-1].get("status") == UNDER_WAY:  # the user ended it
                    kept.pop()
                write(self._report, self._path)
            for name, value in kept[-1].items():
                print(f"  {name}: {figure(value)}", flush=True)

    def _case(self, case: ConvCase, precision: str) -> None:
        """Measures the algorithms of one case that are not in the report."""
        nbytes = case.moved(dtype_of(PRECISIONS[precision][0]).itemsize)
        sizes = (case.operations, nbytes)
        blank = Row(case.family, case.name, case.batch, precision, TENSORS, True, UNDER_WAY, *sizes)
        found = self._tried(blank, partial(self._prepared, case, precision))
        if found is None:
            return
        tensors, fit = found
        wanted = [
            replace(blank, algorithm=name, chosen=name == fit[0])
            for name in algorithms_of(fit, self._options.algorithms)
        ]
        wanted = [row for row in wanted if not self._is_kept(row)]
        peers = self._peers(case, tensors, blank) if wanted else {}
        for row in (replace(row, **peers) for row in wanted):
            done = self._tried(row, partial(self._measured, case, tensors, row))
            if done is not None:
                self._report.rows.append(done)
                print(f"  {described(done)}", flush=True)

    def _prepared(self, case: ConvCase, precision: str) -> tuple[Tensors, list[str]]:
        """A case's tensors, and the algorithms that fit it."""
        rig = self._rig
        rig.arrays.tidy()
        tensors = tensors_of(rig, case, precision)
        allowed = PRECISIONS[precision][1]
        return tensors, fitting(case, tensors.layer, tensors.dtype, allowed, rig.device.info)

    def _measured(self, case: ConvCase, tensors: Tensors, row: Row) -> Row:
        """A row with its figures."""
        repeats = 0 if self._options.only_validate else REPEATS if row.chosen else FEWER_REPEATS
        found = measure(self._rig, case, row.precision, row.algorithm, tensors, repeats=repeats)
        done = replace(row, status=OK, error=found.error, launches=found.launches)
        times = found.times
        if times is None:
            return done
        return replace(
            done,
            device_us=times.device * 1e6,
            fastest_us=times.fastest * 1e6,
            slowest_us=times.slowest * 1e6,
            host_us=times.host * 1e6,
            unaided_us=times.unaided * 1e6,
        )

    def _peers(self, case: ConvCase, tensors: Tensors, blank: Row) -> dict[str, Any]:
        """The peer's fields of a case's rows, in both layouts, measured now or by an earlier run."""
        for row in self._report.rows:
            if row.place == blank.place and row.peer_error is not None:
                return row.peers
        found: dict[str, Any] = {}
        errors: list[float] = []
        for layout, field in ((CONTIGUOUS, "peer"), (CHANNELS_LAST, "peer_channels_last")):
            if not self._has_peer(case, layout):
                continue
            row = replace(blank, algorithm=f"cuDNN, {layout}", chosen=False)
            work = partial(measure_peer, self._rig, case, blank.precision, tensors, layout)
            measured = self._tried(row, work)
            if measured is not None:
                found |= {field: measured.library, f"{field}_us": measured.times.device * 1e6}
                errors.append(measured.error)
        return found | ({"peer_error": max(errors)} if errors else {})

    def _has_peer(self, case: ConvCase, layout: str) -> bool:
        options = self._options
        wanted = not (options.only_validate or options.no_peer or self._rig.peer_clock is None)
        return wanted and not (layout == CHANNELS_LAST and (options.no_channels_last or len(case.x) == 3))

    def _tried(self, row: Row, work: Callable[[], T]) -> T | None:
        """What `work` hands on; None where it fails, now or in an earlier run: the row that says so is kept.

        While it works the file has the row as under way, so that what crashes or hangs has a name.

        Raises:
            Lost: the device answers nothing more.
        """
        if self._is_kept(row):
            return None
        print(f"{row.family}, {row.case}, batch {row.batch}, {row.precision}: {row.algorithm}", flush=True)
        rows = self._report.rows
        rows.append(row)
        self._report.keep(self._path)
        try:
            found = work()
        except KeyboardInterrupt:  # it would have gone on
            rows.pop()
            write(self._report, self._path)
            raise
        except Exception as exc:  # noqa: BLE001 - one failure must not take the others along
            rows[-1] = replace(row, status=_why(exc))
            print(f"  {rows[-1].status}", flush=True)
            self._stop_if_lost(exc)
            return None
        rows.pop()
        return found

    def _is_kept(self, row: Row) -> bool:
        return any(row.key == each.key for each in self._report.rows)

    def _stop_if_lost(self, exc: Exception) -> None:
        why = lost(self._rig.device, exc)
        if why:
            write(self._report, self._path)
            raise Lost(why) from exc

    def _note_left(self, left: int, of: int) -> None:
        """Notes how many cases were not measured: the file says it however the run ends."""
        note = f"{left} of {of} convolutions that were asked for, each in one precision"
        self._report.notes = [note] if left else []


def described(row: Row) -> str:
    """A row's figures in words."""
    numbers = [
        f"{name} {value:.4g}"
        for name, value in (
            ("error", row.error),
            ("us", row.device_us),
            ("TFLOP/s", row.teraflops),
            ("GB/s", row.gigabytes),
            ("ratio", row.ratio),
            ("to the better layout", row.best_ratio),
            ("host us", row.host_us),
        )
        if value is not None
    ]
    return f"{row.status}{', chosen' if row.chosen else ''} ({', '.join(numbers)})"


def _why(exc: Exception) -> str:
    kind = "wrong" if isinstance(exc, Wrong) else f"failed: {type(exc).__name__}"
    return f"{kind}: {' '.join(str(exc).split())[:200]}"
