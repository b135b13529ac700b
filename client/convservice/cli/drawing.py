"""A neuron as a picture: the input, its receptive field with the weights laid over it, and the feature map.

Given neurons taken apart, `draw` writes a PNG or an SVG of one, or a GIF of several in turn. Input values
stand in cells; the cells of the receptive field are coloured and carry the weights as small red numbers;
padding is hatched. The feature map beside it fills as the neurons go by. Drawn by matplotlib without any
window, the same bytes every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.cli.grid import number
from convservice.cli.neuron import NeuronView
from convservice.cli.outcome import CommandFailed, Exit, missing_extra

FORMATS = (".png", ".svg", ".gif")

FIELD, NEURON, PAPER, PADDING = "#ffd8a8", "#a5d8ff", "#ffffff", "#f1f3f5"
"""Colours: the receptive field, the neuron, other cells, padding."""

TIMES = "\N{MULTIPLICATION SIGN}"
"""What stands before a weight."""

_INK, _FAINT, _RED, _LINE = "#212529", "#868e96", "#c92a2a", "#adb5bd"
_CELL = 0.62
"""Side of a cell, in inches."""

_MOST_CELLS = 16
"""Cells along an axis; of a larger input the part around the receptive field is shown."""

_MOST_GRIDS = 4
"""Grids of the input: channels, and planes of them, one below another."""

_FRAME_MILLISECONDS = 700


@dataclass(frozen=True)
class _Grid:
    """A matrix of cells, with what its corner is called.

    Attributes:
        title: above it.
        rows: positions of its rows; those outside the input lie in the padding.
        columns: likewise.
        texts: position to the number in the cell.
        colours: position to the cell's colour.
        small: position to the small number.
        hatched: positions in the padding.
    """

    title: str
    rows: range
    columns: range
    texts: dict[tuple[int, int], str]
    colours: dict[tuple[int, int], str]
    small: dict[tuple[int, int], str]
    hatched: frozenset[tuple[int, int]]


def draw(
    path: Path, views: Sequence[NeuronView], sample: NDArray[Any], feature_map: NDArray[Any], title: str
) -> None:
    """Draws neurons, one a picture.

    Args:
        path: ends with one of `FORMATS`; several neurons need `.gif`.
        views: the neurons, of one channel, in the order they are shown.
        sample: (channels, *spatial), the layer's input.
        feature_map: (*spatial), the neurons' channel as the server computed it.
        title: what the layer is called.

    Raises:
        CommandFailed: matplotlib or Pillow is not installed, or the file cannot be written.
    """
    try:
        matplotlib = import_module("matplotlib")
        import_module("PIL.Image")
    except ImportError as exc:
        raise missing_extra(str(exc.name), "cli") from exc
    settings: dict[str, Any] = {
        "svg.hashsalt": "convservice",  # names within the file, the same every time
        "svg.fonttype": "none",  # numbers stay texts
        "hatch.color": _LINE,
        "hatch.linewidth": 0.8,
        "font.family": "DejaVu Sans",
    }
    with matplotlib.rc_context(settings):
        try:
            _write(path, views, sample, feature_map, title)
        except OSError as exc:
            raise CommandFailed(f"cannot write {path}: {exc.strerror or exc}", Exit.USAGE) from exc


def _write(
    path: Path, views: Sequence[NeuronView], sample: NDArray[Any], feature_map: NDArray[Any], title: str
) -> None:
    extent = _extent(views)
    shown = [None] if len(views) == 1 else [views[: at + 1] for at in range(len(views))]
    frames = (
        _figure(view, so_far, sample, feature_map, (title, extent))
        for view, so_far in zip(views, shown, strict=True)
    )
    if path.suffix.lower() == ".gif":
        pictures = [_pixels(figure) for figure in frames]
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=_FRAME_MILLISECONDS, loop=0
        )
        return
    kind = path.suffix.lower()[1:]
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    next(frames).savefig(path, format=kind, dpi=110, metadata=metadata)


def _pixels(figure: Any) -> Any:
    """A figure as a Pillow image of few colours."""
    canvas = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    figure.set_dpi(80)
    canvas.draw()
    colours = np.asarray(canvas.buffer_rgba())[..., :3]
    return import_module("PIL.Image").fromarray(np.ascontiguousarray(colours)).quantize(256)


def _extent(views: Sequence[NeuronView]) -> tuple[range, range]:
    """Rows and columns from the first to the last that any of the neurons looks at."""
    pairs = [_two(view.axes) for view in views]
    sides = [[axis for pair in pairs if (axis := pair[side])] for side in (0, 1)]
    rows, columns = (
        range(min((a[0] for a in side), default=0), max((a[-1] for a in side), default=-1) + 1)
        for side in sides
    )
    return rows, columns


def _two(axes: Sequence[range]) -> tuple[range, range]:
    """Rows and columns; one axis is one row."""
    return (axes[-2], axes[-1]) if len(axes) > 1 else (range(1), axes[0])


def _shown(size: int, seen: range, all_seen: range) -> range:
    """The positions of an axis that are drawn: all, or those around the receptive field."""
    low, high = min(0, all_seen.start), max(size, all_seen.stop)
    if high - low <= _MOST_CELLS:
        return range(low, high)
    middle = (seen[0] + seen[-1]) // 2 if seen else size // 2
    first = min(max(middle - _MOST_CELLS // 2, low), high - _MOST_CELLS)
    return range(first, first + _MOST_CELLS)


def _figure(
    view: NeuronView,
    so_far: Sequence[NeuronView] | None,
    sample: NDArray[Any],
    feature_map: NDArray[Any],
    named: tuple[str, tuple[range, range]],
) -> Any:
    """One neuron's picture."""
    title, extent = named
    grids = list(_input_grids(view, sample, extent))
    right = _map_grid(view, so_far, feature_map)
    left_width = max((len(grid.columns) for grid in grids), default=1)
    heights = [len(grid.rows) + 1.4 for grid in grids] or [2.4]
    height = max(sum(heights), len(right.rows) + 1.4) + 2.0
    width = max(left_width + len(right.columns) + 4.0, 12.0)
    figure = import_module("matplotlib.figure").Figure(figsize=(width * _CELL, height * _CELL))
    figure.set_facecolor(PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    axes.text(0.8, 0.75, f"{title}, {_caption(view)}", fontsize=11, color=_INK, va="center", weight="bold")
    top = 1.2
    for grid, rows in zip(grids, heights, strict=True):
        _draw_grid(axes, grid, 0.8, top)
        top += rows
    _draw_grid(axes, right, left_width + 2.8, 1.2)
    arrow = {"arrowstyle": "->", "color": _FAINT, "lw": 1.5}
    middle = 2.4 + max((len(grids[0].rows) if grids else 1) / 2, 0.5)
    axes.annotate("", xy=(left_width + 2.4, middle), xytext=(left_width + 1.2, middle), arrowprops=arrow)
    axes.text(0.8, height - 0.45, _formula(view, width), fontsize=9, color=_INK, va="center")
    return figure


def _caption(view: NeuronView) -> str:
    return f"neuron {view.neuron} of channel {view.channel}"


def _input_grids(view: NeuronView, sample: NDArray[Any], extent: tuple[range, range]) -> Iterator[_Grid]:
    """A grid for each channel, and plane of it, that the neuron looks at."""
    rows_seen, columns_seen = _two(view.axes)
    planes = list(view.axes[0]) if len(view.axes) == 3 else [0]
    weights = view.weights
    per_plane = (len(view.values), len(planes), len(rows_seen), len(columns_seen))
    values = view.values.reshape(per_plane)
    shown = [(c, p) for c in range(len(view.values)) for p in range(len(planes))]
    for channel, plane in shown[:_MOST_GRIDS]:
        real = sample[view.first_channel + channel]
        inside_plane = len(view.axes) < 3 or 0 <= planes[plane] < real.shape[0]
        matrix = np.atleast_2d(real[planes[plane] if inside_plane else 0] if len(view.axes) == 3 else real)
        rows = _shown(matrix.shape[0], rows_seen, extent[0]) if len(view.axes) > 1 else range(1)
        columns = _shown(matrix.shape[1], columns_seen, extent[1])
        texts = {
            (r, c): number(float(matrix[r, c])) if inside_plane else ""
            for r in rows
            for c in columns
            if 0 <= r < matrix.shape[0] and 0 <= c < matrix.shape[1]
        }
        hatched = frozenset((r, c) for r in rows for c in columns if not inside_plane or (r, c) not in texts)
        colours: dict[tuple[int, int], str] = {}
        small: dict[tuple[int, int], str] = {}
        for i, r in enumerate(rows_seen):
            for j, c in enumerate(columns_seen):
                colours[r, c] = FIELD
                texts[r, c] = number(float(values[channel, plane, i, j]))
                if weights is not None:
                    weight = float(weights.reshape(per_plane)[channel, plane, i, j])
                    small[r, c] = f"{TIMES}{number(weight)}"
        name = f"input, channel {view.first_channel + channel}"
        if len(view.axes) == 3:
            name += f", plane {planes[plane]}"
        if len(shown) > _MOST_GRIDS and (channel, plane) == shown[_MOST_GRIDS - 1]:
            name += f" ({len(shown) - _MOST_GRIDS} more like it)"
        yield _Grid(name, rows, columns, texts, colours, small, hatched)


def _map_grid(view: NeuronView, so_far: Sequence[NeuronView] | None, feature_map: NDArray[Any]) -> _Grid:
    """The feature map: the neurons shown so far, or all of it where that is None."""
    plane = feature_map[view.neuron[0]] if feature_map.ndim == 3 else feature_map
    matrix = np.atleast_2d(plane)
    row, column = _place(view)
    rows = _shown(matrix.shape[0], range(row, row + 1), range(matrix.shape[0]))
    columns = _shown(matrix.shape[1], range(column, column + 1), range(matrix.shape[1]))
    done = {_place(one) for one in so_far or ()}
    texts = {
        (r, c): number(float(matrix[r, c])) for r in rows for c in columns if so_far is None or (r, c) in done
    }
    name = f"feature map, channel {view.channel}"
    if feature_map.ndim == 3:
        name += f", plane {view.neuron[0]}"
    return _Grid(name, rows, columns, texts, {(row, column): NEURON}, {}, frozenset())


def _place(view: NeuronView) -> tuple[int, int]:
    """A neuron's row and column in its plane of the feature map."""
    place = (0, *view.neuron)
    return place[-2], place[-1]


def _draw_grid(axes: Any, grid: _Grid, left: float, top: float) -> None:
    """Draws a grid with its title; `left` and `top` in cells."""
    rectangle = import_module("matplotlib.patches").Rectangle
    axes.text(left, top + 0.4, grid.title, fontsize=9, color=_FAINT, va="center")
    longest = max((len(text) for text in grid.texts.values()), default=1)
    size = 13 if longest <= 3 else 10 if longest <= 5 else max(5.5, 50 / longest)
    for i, row in enumerate(grid.rows):
        for j, column in enumerate(grid.columns):
            at, x, y = (row, column), left + j, top + 0.8 + i
            hatched = at in grid.hatched
            colour = grid.colours.get(at, PADDING if hatched else PAPER)
            axes.add_patch(
                rectangle(
                    (x, y), 1, 1, facecolor=colour, edgecolor=_LINE, lw=1, hatch="///" if hatched else None
                )
            )
            ink = _FAINT if hatched else _INK
            lifted = 0.4 if at in grid.small else 0.5
            axes.text(
                x + 0.5,
                y + lifted,
                grid.texts.get(at, ""),
                fontsize=size,
                color=ink,
                ha="center",
                va="center",
            )
            small = grid.small.get(at, "")
            axes.text(
                x + 0.94,
                y + 0.82,
                small,
                fontsize=8 if len(small) <= 5 else max(4.5, 40 / len(small)),
                color=_RED,
                ha="right",
                va="center",
            )


def _formula(view: NeuronView, width: float) -> str:
    """What the neuron adds up, as far as there is room."""
    values = view.values.ravel().tolist()
    if view.weights is None:
        real = np.broadcast_to(view.inside, view.values.shape).ravel().tolist()
        parts = [number(value) for value, inside in zip(values, real, strict=True) if inside]
        joined = f"({' + '.join(parts)}) / {view.divisor}" if view.divisor else f"max({', '.join(parts)})"
    else:
        pairs = zip(values, view.weights.ravel().tolist(), strict=True)
        joined = " + ".join(f"{number(value)}·{number(weight)}" for value, weight in pairs)
        if view.threshold:
            joined += f" + {number(view.threshold)}"
        if view.function != "linear":
            joined = f"{view.function}({joined})"
    room = math.floor(width * 7.2)
    result = f" = {number(view.expected)}"
    if len(joined) + len(result) > room:
        joined = f"{joined[: room - len(result) - 4]} ..."
    return joined + result
