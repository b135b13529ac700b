"""The axes of a launch: where the windows of a run's outputs look, in coordinates of the rows that are held.

Given the windows of a layer and a run, `sliding_axes` and `transposed_axes` hand on the three `AxisArguments`
that kernels are given whatever the rank: missing axes come first, with one output and one weight. Coordinates
of the first axis count from the first row held, those of the others from the first element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from convservice.geometry import AxisWindow
from convservice.layers.windows import TransposedWindow
from convservice_backends.cuda.arguments import AxisArguments
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.operators import Run

FAR = 1 << 30
"""A coordinate beyond any that a kernel meets."""

Axes = tuple[AxisArguments, AxisArguments, AxisArguments]


def sliding_axes(windows: Sequence[AxisWindow], run: Run, first: int, out: DeviceArray) -> Axes:
    """The axes of a convolution or a pooling.

    Args:
        windows: along every spatial axis.
        run: what is held.
        first: the first output row of the launch.
        out: what the launch writes.
    """
    sizes, steps = _sizes_and_steps(run)
    axes: list[AxisArguments] = []
    for axis, (window, size, step) in enumerate(zip(windows, sizes, steps, strict=True)):
        held_from, begin = (run.first_row, first) if axis == 0 else (0, 0)
        axes.append(
            AxisArguments(
                count=out.shape[2 + axis],
                start=begin * window.stride - window.before - held_from,
                low=max(-held_from, -FAR),
                high=FAR if size is None else size - held_from,
                kernel=window.kernel,
                stride=window.stride,
                dilation=window.dilation,
                step=step,
            )
        )
    return _three(axes)


def transposed_axes(
    windows: Sequence[TransposedWindow], run: Run, first: int, out: DeviceArray
) -> tuple[Axes, int]:
    """The axes of a transposed convolution; see kernels/transposed.cu.

    Its coordinates of the first axis count from a row near the first that the launch looks at, so that 32
    bits hold all that is computed with them.

    Returns:
        The axes, and the rows held before that row.
    """
    sizes, steps = _sizes_and_steps(run)
    axes: list[AxisArguments] = []
    skipped = 0
    for axis, (window, size, step) in enumerate(zip(windows, sizes, steps, strict=True)):
        base, begin = 0, 0
        if axis == 0:
            begin = first
            near = (first + window.before - window.extent + 1) // window.stride
            base = max(run.first_row, min(near, run.first_row + run.rows.shape[2] - 1))
            skipped = base - run.first_row
        axes.append(
            AxisArguments(
                count=out.shape[2 + axis],
                start=begin + window.before - base * window.stride,
                low=max(-base, -FAR),
                high=FAR if size is None else min(size - base, FAR),
                kernel=window.kernel,
                stride=window.stride,
                dilation=window.dilation,
                step=step,
            )
        )
    return _three(axes), skipped


def _sizes_and_steps(run: Run) -> tuple[tuple[int | None, ...], list[int]]:
    """Of every spatial axis of the input: its size, and the elements between neighbours."""
    rest = run.rows.shape[3:]
    return (run.height, *rest), [math.prod(rest[axis:]) for axis in range(1 + len(rest))]


def _three(axes: Iterable[AxisArguments]) -> Axes:
    given = tuple(axes)
    missing = (
        AxisArguments(count=1, low=0, high=1, kernel=1, stride=1, dilation=1, step=0)
        for _ in range(3 - len(given))
    )
    first, second, third = (*missing, *given)
    return first, second, third
