"""How many weights of sliding windows lie on an axis: closed forms, as cheap for huge axes as small ones."""

from __future__ import annotations


def window_pairs(neurons: int, size: int, *, kernel: int, stride: int, dilation: int, before: int) -> int:
    """Pairs (i, k) of a neuron and a weight on the axis: 0 <= i*stride - before + k*dilation < size.

    Args:
        neurons: i runs from 0 to it.
        size: positions of the axis.
        kernel: k runs from 0 to it.
        stride: step between neighbouring neurons.
        dilation: step between neighbouring weights.
        before: padding before the first position.

    Weight k lies below position x for min(max(ceil((x + before - k*dilation) / stride), 0), neurons) neurons;
    the sum of that over k, for x = size less the same for x = 0, is what is asked for.
    """
    below = (_clamped_sum(x + before + stride - 1, dilation, stride, kernel, neurons) for x in (size, 0))
    return next(below) - next(below)


def _clamped_sum(start: int, step: int, divisor: int, count: int, most: int) -> int:
    """The sum over 0 <= k < count of floor((start - k*step) / divisor), each held between 0 and `most`."""
    # The terms fall with k: those before `full` are at least `most`, those from `none` on at most 0.
    full = min(max((start - most * divisor) // step + 1, 0), count)
    none = min(max((start - divisor) // step + 1, full), count)
    between = none - full
    # Turned round, so that the terms rise from the last one on.
    lowest = start - (none - 1) * step
    return full * most + _floor_sum(between, divisor, step, lowest)


def _floor_sum(count: int, divisor: int, step: int, start: int) -> int:
    """The sum over 0 <= k < count of floor((step*k + start) / divisor), as fast as Euclid's algorithm.

    `step` and `start` are at least 0 where `count` is not 0.
    """
    total = 0
    while count:
        total += (count - 1) * count // 2 * (step // divisor) + count * (start // divisor)
        step, start = step % divisor, start % divisor
        count, start = divmod(step * count + start, divisor)
        step, divisor = divisor, step
    return total
