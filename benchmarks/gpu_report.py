"""Results of the GPU benchmark: as rows, as JSON that is kept and gone on with.

A `Row` is one algorithm on one case. A `Report` is the rows with what they were measured on. It is kept
before and after every row, so that a run that is cut short, by whatever, leaves what it had: a row that was
under way then says so. Whatever can be derived (rates, shares, ratios, means) is derived when a table is
written and not kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_peaks import Peaks

OK = "ok"

UNDER_WAY = "under way"
"""Status of what had begun when the file was written."""

CRASHED = "crashed or hung"
"""Status of what was under way when an earlier run ended."""

SAME = ("device", "versions", "kernels")
"""What two runs must have in common whose rows go into one table."""

PRECISION_ORDER = ("float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One algorithm on one case.

    Attributes:
        family: the case's.
        case: its name.
        batch: samples.
        precision: as the table has it.
        algorithm: by name; what else was tried where that failed.
        chosen: whether the backend takes it by itself.
        status: "ok", or why there are no times: "wrong: ...", "failed: ...", `UNDER_WAY` or `CRASHED`.
        operations: of the case.
        nbytes: input, filters and feature map, each once.
        error: largest error as a share of the promised bound.
        launches: kernels of one call.
        device_us: device's time of one call, a median.
        fastest_us: the least that it is a median of.
        slowest_us: the most.
        host_us: host's time to ask for one.
        unaided_us: device's time of one call where the host has no head start.
        peer: whose kernel PyTorch took for the same tensors.
        peer_us: its time.
        peer_channels_last: whose kernel it took for tensors that are channels-last beforehand.
        peer_channels_last_us: its time.
        peer_error: the larger error of both as a share of the bound.
    """

    family: str
    case: str
    batch: int
    precision: str
    algorithm: str
    chosen: bool
    status: str
    operations: int
    nbytes: int
    error: float | None = None
    launches: int | None = None
    device_us: float | None = None
    fastest_us: float | None = None
    slowest_us: float | None = None
    host_us: float | None = None
    unaided_us: float | None = None
    peer: str | None = None
    peer_us: float | None = None
    peer_channels_last: str | None = None
    peer_channels_last_us: float | None = None
    peer_error: float | None = None

    @property
    def place(self) -> tuple[str, str, int, str]:
        """Its case, batch and precision."""
        return (self.family, self.case, self.batch, self.precision)

    @property
    def key(self) -> tuple[object, ...]:
        """What it is the only row of."""
        return (*self.place, self.algorithm)

    @property
    def peers(self) -> dict[str, Any]:
        """Its fields of the peer."""
        return {name: value for name, value in vars(self).items() if name.startswith("peer")}

    @property
    def ratio(self) -> float | None:
        """The peer's time on the same tensors over this one's: above 1 this one is faster."""
        return _over(self.peer_us, self.device_us)

    @property
    def channels_last_ratio(self) -> float | None:
        """The same for the peer's other layout."""
        return _over(self.peer_channels_last_us, self.device_us)

    @property
    def best_ratio(self) -> float | None:
        """The same for the layout that is faster."""
        return min((each for each in (self.ratio, self.channels_last_ratio) if each), default=None)

    @property
    def spread(self) -> float | None:
        """How far apart the fastest and the slowest measurement are, as a share of the median."""
        if not self.device_us or self.fastest_us is None or self.slowest_us is None:
            return None
        return (self.slowest_us - self.fastest_us) / self.device_us

    @property
    def teraflops(self) -> float | None:
        """10**12 operations a second."""
        return self.operations / self.device_us / 1e6 if self.device_us else None

    @property
    def gigabytes(self) -> float | None:
        """10**9 bytes a second."""
        return self.nbytes / self.device_us / 1e3 if self.device_us else None

    @property
    def idle(self) -> float | None:
        """Share of the time that the device waits for the host where calls have no head start."""
        if not self.device_us or not self.unaided_us:
            return None
        return max(0.0, 1 - self.device_us / self.unaided_us)

    def bound_by_memory(self, peaks: Peaks | None) -> bool:
        """Whether moving its bytes takes longer than its operations, both at their peaks."""
        rate = peaks.rate(self.precision) if peaks else None
        if peaks is None or rate is None:
            return False
        return self.nbytes / peaks.bandwidth / 1e9 > self.operations / rate / 1e12


@dataclass
class Report:
    """All that was measured on one device.

    Attributes:
        header: device, driver, versions, digest of the kernels, date, options: name to value.
        rows: the rows.
        stream: figures of the streaming benchmark, one mapping for each input dtype.
        notes: what was left out, and why.
        peaks: measured, precision to TFLOP/s, and "memory" to GB/s.
    """

    header: dict[str, str]
    rows: list[Row] = field(default_factory=list[Row])
    stream: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notes: list[str] = field(default_factory=list[str])
    peaks: dict[str, float] = field(default_factory=dict[str, float])

    def keep(self, path: Path) -> None:
        """Writes `path` with the suffix .json, a row on a line."""
        others = {"header": self.header, "notes": self.notes, "peaks": self.peaks, "stream": self.stream}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in others.items()]
        rows = ",\n".join(json.dumps(vars(row)) for row in self.rows)
        text = "\n".join(["{", *lines, '"rows": [', rows, "]}"])
        write_whole(path.with_suffix(".json"), f"{text}\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """From the JSON file."""
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept["rows"] = [Row(**row) for row in kept["rows"]]
        return cls(**kept)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that whoever ends this process in between leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def resumed(paths: Sequence[Path], header: dict[str, str], *, timed: bool = True) -> Report:
    """A report that goes on with kept ones.

    Args:
        paths: their JSON files; what two have in common is taken from the first.
        header: of the run that goes on.
        timed: whether it times: rows that were only validated are then wanted again.

    Raises:
        ValueError: one was measured on another device, with other versions or of other kernels.
    """
    report = Report(header)
    for path in paths:
        kept = Report.read(path)
        for name in SAME:
            if kept.header.get(name) != header[name]:
                raise ValueError(f"{path}: {name} was {kept.header.get(name)}, and is {header[name]} here")
        there = {row.key for row in report.rows}
        for row in kept.rows:
            if row.key in there or (timed and row.status == OK and row.device_us is None):
                continue
            report.rows.append(replace(row, status=CRASHED) if row.status == UNDER_WAY else row)
        streamed = {figures["dtype"] for figures in report.stream}
        for figures in kept.stream:
            if figures["dtype"] not in streamed:
                ended = {"status": CRASHED} if figures.get("status") == UNDER_WAY else {}
                report.stream.append(figures | ended)
        report.peaks = report.peaks or kept.peaks
    return report


def geometric_mean(values: Iterable[float]) -> float | None:
    """The n-th root of a product of n positive numbers; None where there are none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else None


def ratios(
    report: Report, family: str | None, precision: str, batch: int | None = None, *, best: bool = False
) -> list[float]:
    """Of the chosen algorithms to the peer, over a family (or all) and a batch (or all).

    Args:
        report: the rows.
        family: its name; all where None.
        precision: as the table has it.
        batch: samples; any where None.
        best: to the better of the peer's two layouts, not to the same tensors.
    """
    rows = [
        row
        for row in report.rows
        if row.chosen and row.precision == precision
        if family in (None, row.family) and batch in (None, row.batch)
    ]
    found = [row.best_ratio if best else row.ratio for row in rows]
    return [ratio for ratio in found if ratio is not None]


def _over(peer_us: float | None, device_us: float | None) -> float | None:
    return peer_us / device_us if peer_us and device_us else None
