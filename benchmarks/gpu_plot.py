"""The GPU benchmark's plot: ratio to cuDNN, layer by layer, drawn from the JSON that was kept.

`draw` is given a `Report` and a path and writes a PNG: a panel for each precision, the layers side by side by
family, one mark for each batch, on a logarithmic axis with cuDNN at 1. Of cuDNN's two layouts it is the one
that is faster, layer by layer. It needs matplotlib and no GPU.
"""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import PRECISION_ORDER, Report, Row, geometric_mean

MARKS = "os^Dv*"

TICKS = tuple(digits * 10.0**power for power in range(-3, 4) for digits in (1, 2, 5))
"""Of the ratios' axis."""


def drawn(report: Report) -> list[Row]:
    """The rows that a plot shows: of chosen algorithms, with a ratio."""
    return [row for row in report.rows if row.chosen and row.best_ratio is not None]


def draw(report: Report, path: Path, title: str | None = None) -> None:
    """Writes the plot.

    Args:
        report: what was measured.
        path: of the PNG.
        title: above it; the device and date where not given.

    Raises:
        ValueError: no row is to be drawn.
    """
    rows = drawn(report)
    if not rows:
        raise ValueError("there is no ratio to cuDNN to draw")
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    precisions = [name for name in PRECISION_ORDER if any(row.precision == name for row in rows)]
    layers = list(dict.fromkeys((row.family, row.case) for row in rows))
    size = (max(8.0, 0.2 * len(layers) + 3), 2.8 * len(precisions) + 2.2)
    figure, axes = pyplot.subplots(len(precisions), 1, sharex=True, squeeze=False, figsize=size)
    places = {layer: place for place, layer in enumerate(layers)}
    batches = sorted({row.batch for row in rows})
    for axis, precision in zip(axes[:, 0], precisions, strict=True):
        _panel(axis, [row for row in rows if row.precision == precision], places, batches)
        axis.set_ylabel(f"{precision}: cuDNN / ours", fontsize=8)
    last = axes[-1, 0]
    last.set_xticks(range(len(layers)), [case for _, case in layers], rotation=90, fontsize=6)
    last.set_xlim(-0.7, len(layers) - 0.3)
    device, date = report.header.get("device", ""), report.header.get("date", "")
    said = "Time of PyTorch with cuDNN, in the better of two layouts, over time of ConvService"
    figure.suptitle(title or f"{said}\n{device}, {date}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, rows: list[Row], places: dict[tuple[str, str], int], batches: list[int]) -> None:
    """One precision: marks for batches, the same in all panels, bands for families, a line at 1."""
    for number, batch in enumerate(batches):
        here = [row for row in rows if row.batch == batch]
        xs = [places[row.family, row.case] for row in here]
        values = [row.best_ratio or math.nan for row in here]
        axis.plot(xs, values, MARKS[number % len(MARKS)], markersize=4, label=f"batch {batch}")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS], fontsize=7)
    axis.set_yticks([], minor=True)
    axis.set_ylim(min(low, 0.5), max(high, 2.0))
    axis.axhline(1.0, color="black", linewidth=0.8)
    families = list(dict.fromkeys(family for family, _ in places))
    for number, family in enumerate(families):
        inside = [place for (name, _), place in places.items() if name == family]
        left, right = min(inside) - 0.5, max(inside) + 0.5
        if number % 2:
            axis.axvspan(left, right, color="black", alpha=0.06, linewidth=0)
        mean = geometric_mean(row.best_ratio for row in rows if row.family == family and row.best_ratio)
        if mean is not None:
            axis.hlines(mean, left, right, color="tab:red", linewidth=1)
            axis.text(
                (left + right) / 2,
                1.02,
                f"{family}\n{mean:.2f}",
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=6,
            )
    axis.grid(axis="y", linewidth=0.2)
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
