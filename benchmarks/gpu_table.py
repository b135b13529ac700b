"""Results of the GPU benchmark: as rows, as JSON to be kept, as the Markdown table drawn from it.

A `Row` is one algorithm on one case. A `Report` is the rows with what they were measured on; it is written
after every case, so that a run that is cut short leaves what it had. Whatever can be derived (rates, shares,
ratios, means) is derived when the table is written and not kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_peaks import Peaks, peaks_of

OK = "ok"

PRECISION_ORDER = ("float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One algorithm on one case.

    Attributes:
        family: the case's.
        case: its name.
        batch: samples.
        precision: as the table has it.
        algorithm: by name.
        chosen: whether the backend takes it by itself.
        status: "ok", or why there are no times: "wrong: ..." or "failed: ...".
        operations: of the case.
        nbytes: input, filters and feature map, each once.
        error: largest error as a share of the promised bound.
        launches: kernels of one call.
        device_us: device's time of one call.
        host_us: host's time to ask for one.
        unaided_us: device's time of one call where the host has no head start.
        peer_us: cuDNN's time on the same tensors.
        peer_channels_last_us: cuDNN's time on tensors that are channels-last beforehand.
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
    host_us: float | None = None
    unaided_us: float | None = None
    peer_us: float | None = None
    peer_channels_last_us: float | None = None

    @property
    def ratio(self) -> float | None:
        """cuDNN's time over this one's: above 1 this one is faster."""
        if not self.peer_us or not self.device_us:
            return None
        return self.peer_us / self.device_us

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
    """All that one run measured.

    Attributes:
        header: device, driver, versions, digest of the kernels, date, options: name to value.
        rows: the rows.
        stream: figures of the streaming benchmark, one mapping for each input dtype.
        notes: what was left out, and why.
    """

    header: dict[str, str]
    rows: list[Row] = field(default_factory=list[Row])
    stream: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notes: list[str] = field(default_factory=list[str])

    def write(self, path: Path) -> None:
        """Writes `path` with the suffixes .json and .md."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = asdict(self)
        path.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text("\n".join(markdown(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """From the JSON file."""
        kept = json.loads(path.read_text(encoding="utf-8"))
        return cls(kept["header"], [Row(**row) for row in kept["rows"]], kept["stream"], kept["notes"])


def geometric_mean(values: Iterable[float]) -> float | None:
    """The n-th root of a product of n positive numbers; None where there are none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else None


def ratios(report: Report, family: str | None, precision: str, batch: int | None = None) -> list[float]:
    """Of the chosen algorithms to cuDNN, over a family (or all) and a batch (or all)."""
    return [
        row.ratio
        for row in report.rows
        if row.chosen and row.precision == precision and row.ratio is not None
        if family in (None, row.family) and batch in (None, row.batch)
    ]


def markdown(report: Report) -> list[str]:
    """The report's lines."""
    lines = ["# Convolutions on a GPU beside cuDNN", "", "`make bench-gpu`", ""]
    lines += [f"- {name}: {value}" for name, value in report.header.items()]
    peaks = peaks_of(report.header.get("device", ""))
    if peaks is not None:
        rates = ", ".join(f"{name} {value:g} TFLOP/s" for name, value in peaks.rates.items())
        lines.append(f"- peaks: {rates}, memory {peaks.bandwidth:g} GB/s ({peaks.source})")
    lines += ["", *EXPLANATION, ""]
    lines += [f"- left out: {note}" for note in report.notes]
    lines += _means(report)
    families = list(dict.fromkeys(row.family for row in report.rows))
    for precision in PRECISION_ORDER:
        for family in families:
            rows = [row for row in report.rows if (row.family, row.precision) == (family, precision)]
            if rows:
                lines += ["", f"## {family}, {precision}", "", *_head(), *_table(rows, peaks)]
    if report.stream:
        lines += ["", *_stream(report.stream)]
    return lines


EXPLANATION = (
    "The operator alone on device arrays, validated against a float64 convolution first (exact on integers",
    "where that is promised), then timed: the median of several measurements by device events around many",
    "calls, asked for while the device is kept waiting, on copies of the tensors that take 2.5 times the",
    "last level cache (at most 128 copies). cuDNN: PyTorch on the same tensors with the same precision,",
    "`cudnn.benchmark` on. Ratio: cuDNN's time over this one's, above 1 this one is faster; channels-last:",
    "the ratio to cuDNN given tensors that are channels-last beforehand. Error: the largest as a share of",
    "the promised bound. Peak: share of the unit made for the precision (float32: the CUDA cores). GB/s",
    "count input, filters and feature map once; where memory is the bound, a share of its peak stands",
    "beside them. Host: time to ask for one call. Idle: share of the time that the device waits for the",
    "host where one call after the other is asked for. In bold: what the backend chooses by itself.",
)


def _head() -> tuple[str, str]:
    columns = ["convolution", "batch", "algorithm", "error", "us", "TFLOP/s", "peak", "GB/s", "cuDNN us"]
    columns += ["ratio", "channels-last", "launches a sample", "host us", "idle"]
    return f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"


def _table(rows: list[Row], peaks: Peaks | None) -> Iterator[str]:
    for row in rows:
        name = f"**{row.algorithm}**" if row.chosen else row.algorithm
        if row.status != OK:
            yield f"| {row.case} | {row.batch} | {name} | {row.status} |{' |' * 10}"
            continue
        rate = peaks.rate(row.precision) if peaks else None
        share = f"{row.teraflops / rate:.0%}" if rate and row.teraflops else ""
        moved = f"{row.gigabytes:.0f}" if row.gigabytes else ""
        if peaks is not None and row.gigabytes and row.bound_by_memory(peaks):
            moved += f" ({row.gigabytes / peaks.bandwidth:.0%})"
        last = (
            row.peer_channels_last_us / row.device_us if row.peer_channels_last_us and row.device_us else None
        )
        launches = None if row.launches is None else row.launches / row.batch
        cells = (
            row.case,
            str(row.batch),
            name,
            _number(row.error, ".3f"),
            _number(row.device_us, ".1f"),
            _number(row.teraflops, ".2f"),
            share,
            moved,
            _number(row.peer_us, ".1f"),
            _number(row.ratio, ".2f"),
            _number(last, ".2f"),
            _number(launches, ".3g"),
            _number(row.host_us, ".1f"),
            _number(row.idle, ".0%"),
        )
        yield f"| {' | '.join(cells)} |"


def _means(report: Report) -> list[str]:
    """Geometric means of the ratios, by family, batch and precision."""
    present = [name for name in PRECISION_ORDER if any(row.precision == name for row in report.rows)]
    if not any(row.ratio is not None for row in report.rows):
        return []
    lines = ["", "## Ratio to cuDNN, geometric means of the chosen algorithms", ""]
    lines += [f"| | batch | {' | '.join(present)} |", f"| --- | --- |{' --- |' * len(present)}"]
    places: list[tuple[str | None, int | None]] = [(None, None)]
    for family in dict.fromkeys(row.family for row in report.rows):
        batches = sorted({row.batch for row in report.rows if row.family == family})
        places += [(family, None)] if len(batches) > 1 else []
        places += [(family, batch) for batch in batches]
    for place, batch in places:
        found = [ratios(report, place, precision, batch) for precision in present]
        cells = [
            f"{_number(geometric_mean(values), '.2f')} ({len(values)})" if values else "" for values in found
        ]
        lines.append(f"| {place or 'all'} | {batch or 'all'} | {' | '.join(cells)} |")
    return [*lines, "", "In brackets: how many convolutions."]


def _stream(figures: list[dict[str, Any]]) -> list[str]:
    """The streaming benchmark's figures, one column for each run."""
    lines = ["## A stream of images, transfers included", ""]
    names = list(dict.fromkeys(name for each in figures for name in each))
    lines += [f"| {'figure'} |{' |' * len(figures)}", f"| --- |{' --- |' * len(figures)}"]
    for name in names:
        lines.append(f"| {name} | {' | '.join(_figure(each.get(name)) for each in figures)} |")
    return lines


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
