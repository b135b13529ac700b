"""The Markdown table of a report of the GPU benchmark.

`write` is given a `Report` and a path and writes the JSON with the table beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_peaks import Peaks, peaks_of
from benchmarks.gpu_peer import CUDNN
from benchmarks.gpu_report import OK, PRECISION_ORDER, Report, Row, geometric_mean, ratios, write_whole

EXPLANATION = (
    "The operator alone on device arrays, validated against a float64 convolution first (exact on integers",
    "where that is promised), then timed: the median of 7 measurements (of 3 where the algorithm is not the",
    "one chosen) by device events around many calls, asked for while the device is kept waiting, on copies",
    "of input, packed filters and map that take 2.5 times the last level cache (at most 128 copies).",
    "Spread: from the fastest measurement to the slowest, as a share of the median. cuDNN: PyTorch on the",
    "same tensors with the same precision, `cudnn.benchmark` on; where PyTorch takes a kernel of its own,",
    "that is said beside the figure. Ratio: cuDNN's time over this one's, above 1 this one is faster;",
    "channels-last: the ratio to cuDNN given tensors that are channels-last beforehand, which PyTorch does",
    "not know for one spatial axis. Error: the largest as a share of the promised bound; cuDNN, which",
    "promises nothing, may exceed it. Of peak: share of the datasheet's rate of the unit made for the",
    "precision (float32: the CUDA cores), and of the rate that a product of matrices reaches through",
    "PyTorch. GB/s count input, filters and feature map once; where memory is the bound, their share of the",
    "datasheet's and of a measured copy's bandwidth stands beside them. Host: time to ask for one call.",
    "Idle: share of the time that the device waits for the host where one call after the other is asked",
    "for. In bold: what the backend chooses by itself.",
)

COLUMNS = (
    *("convolution", "batch", "algorithm", "error", "us", "spread", "TFLOP/s", "of peak", "GB/s"),
    *("cuDNN us", "cuDNN error", "ratio", "channels-last", "launches a sample", "host us", "idle"),
)


def write(report: Report, path: Path) -> None:
    """Writes `path` with the suffixes .json and .md."""
    report.keep(path)
    write_whole(path.with_suffix(".md"), "\n".join(markdown(report)) + "\n")


def markdown(report: Report) -> list[str]:
    """The report's lines."""
    lines = ["# Convolutions on a GPU beside cuDNN", "", "`make bench-gpu`", ""]
    lines += [f"- {name}: {value}" for name, value in report.header.items()]
    peaks = peaks_of(report.header.get("device", ""))
    if peaks is not None:
        lines.append(f"- peaks by datasheet: {_rates(peaks.rates, peaks.bandwidth)} ({peaks.source})")
    if report.peaks:
        rates = {name: report.peaks[name] for name in PRECISION_ORDER if name in report.peaks}
        lines.append(
            f"- peaks measured: {_rates(rates, report.peaks.get('memory'))} (PyTorch's product of 8192x8192"
            " matrices; a copy on the device, bytes read and written)"
        )
    lines += [f"- left out: {note}" for note in report.notes]
    lines += ["", *EXPLANATION]
    lines += _means(report, "## Ratio to cuDNN on the same tensors", best=False)
    lines += _means(report, "## Ratio to cuDNN in the better of its two layouts", best=True)
    families = list(dict.fromkeys(row.family for row in report.rows))
    for precision in PRECISION_ORDER:
        for family in families:
            rows = [row for row in report.rows if (row.family, row.precision) == (family, precision)]
            if rows:
                lines += ["", f"## {family}, {precision}", "", *_head(COLUMNS)]
                lines += (_line(row, peaks, report.peaks) for row in rows)
    if report.stream:
        lines += ["", *_stream(report.stream)]
    return lines


def means(report: Report) -> Iterator[str]:
    """The ratios' geometric means over everything, a line for each precision."""
    for precision in PRECISION_ORDER:
        same = geometric_mean(ratios(report, None, precision))
        best = geometric_mean(ratios(report, None, precision, best=True))
        if best is not None:
            yield (
                f"ratio to cuDNN, {precision}, geometric means: {_number(same, '.2f') or 'none'} on the same"
                f" tensors, {best:.2f} to the better of its two layouts"
            )


def _rates(rates: dict[str, float], bandwidth: float | None) -> str:
    said = [f"{name} {value:.4g} TFLOP/s" for name, value in rates.items()]
    return ", ".join([*said, f"memory {bandwidth:.4g} GB/s"] if bandwidth else said)


def _head(columns: tuple[str, ...]) -> tuple[str, str]:
    return _cells(columns), f"|{' --- |' * len(columns)}"


def _cells(values: tuple[str, ...]) -> str:
    escaped = (value.replace("|", "\\|") for value in values)
    return f"| {' | '.join(escaped)} |"


def _line(row: Row, peaks: Peaks | None, measured: dict[str, float]) -> str:
    name = f"**{row.algorithm}**" if row.chosen else row.algorithm
    if row.status != OK:
        return _cells((row.case, str(row.batch), name, row.status, *[""] * (len(COLUMNS) - 4)))
    rates = (peaks.rate(row.precision) if peaks else None, measured.get(row.precision))
    moved = _number(row.gigabytes, ".0f")
    if row.bound_by_memory(peaks):
        moved += f" ({_shares(row.gigabytes, peaks.bandwidth if peaks else None, measured.get('memory'))})"
    launches = None if row.launches is None else row.launches / row.batch
    return _cells(
        (
            row.case,
            str(row.batch),
            name,
            _number(row.error, ".3f"),
            _number(row.device_us, ".1f"),
            _number(row.spread, ".0%"),
            _number(row.teraflops, ".2f"),
            _shares(row.teraflops, *rates),
            moved,
            _number(row.peer_us, ".1f") + _whose(row.peer),
            _number(row.peer_error, ".3f"),
            _number(row.ratio, ".2f"),
            _number(row.channels_last_ratio, ".2f") + _whose(row.peer_channels_last),
            _number(launches, ".3g"),
            _number(row.host_us, ".1f"),
            _number(row.idle, ".0%"),
        )
    )


def _whose(library: str | None) -> str:
    return f" ({library})" if library not in (None, CUDNN) else ""


def _shares(value: float | None, *bases: float | None) -> str:
    """Shares of a datasheet's and of a measured peak; a dash for the one that is not known."""
    if not value or not any(bases):
        return ""
    return " / ".join(f"{value / base:.0%}" if base else "-" for base in bases)


def _means(report: Report, title: str, *, best: bool) -> list[str]:
    """Geometric means of the ratios, by family, batch and precision."""
    present = [name for name in PRECISION_ORDER if ratios(report, None, name, best=best)]
    if not present:
        return []
    lines = [
        "",
        title,
        "",
        "Geometric means of the chosen algorithms; in brackets, how many convolutions.",
        "",
    ]
    lines += _head(("", "batch", *present))
    places: list[tuple[str | None, int | None]] = [(None, None)]
    for family in dict.fromkeys(row.family for row in report.rows):
        batches = sorted({row.batch for row in report.rows if row.family == family})
        places += [(family, None)] if len(batches) > 1 else []
        places += [(family, batch) for batch in batches]
    for place, batch in places:
        found = [ratios(report, place, precision, batch, best=best) for precision in present]
        cells = [
            f"{_number(geometric_mean(values), '.2f')} ({len(values)})" if values else "" for values in found
        ]
        lines.append(_cells((place or "all", str(batch or "all"), *cells)))
    return lines


def _stream(figures: list[dict[str, Any]]) -> list[str]:
    """The streaming benchmark's figures, one column for each run."""
    names = list(dict.fromkeys(name for each in figures for name in each))
    lines = ["## A stream of images, transfers included", "", *_head(("figure", *[""] * len(figures)))]
    return [*lines, *(_cells((name, *(figure(each.get(name)) for each in figures))) for name in names)]


def figure(value: Any) -> str:
    """A figure of the streaming benchmark as it is written."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
