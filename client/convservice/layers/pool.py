"""Pooling: every neuron takes the largest value, or the mean, of a window of its own channel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, AxisWindow, Pads, Same, SampleShape, same_padding
from convservice.layers.base import Layer, ReceptiveField, split_shape, windowed_field
from convservice.layers.weights import check_rank
from convservice.layers.windows import output_sizes, sample_of
from convservice.parameters import flag, has_items, integer, padding_of, per_axis

PerAxis = int | tuple[int, ...]
"""One integer for axes of any number, or one for each."""


class Pool(Layer):
    """What both kinds of pooling share: a window that slides over every channel by itself.

    Attributes:
        kernel_size: sizes of the window; one integer for data of any rank, or one per spatial axis.
        stride: step between neighbouring windows, likewise.
        padding: "same", one integer for data of any rank, or a (before, after) pair per spatial axis.
        ceil_mode: whether a last window may reach beyond the padding.
    """

    _own: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None,
        padding: int | str | Sequence[int] | Sequence[Sequence[int]],
        dilation: int | Sequence[int],
        ceil_mode: bool,
    ) -> None:
        steps = kernel_size if stride is None else stride
        self._rank = _rank_of(kernel_size, steps, dilation, padding)
        self.kernel_size = _per_axis("kernel_size", kernel_size, self._rank)
        self.stride = _per_axis("stride", steps, self._rank)
        self._dilation = _per_axis("dilation", dilation, self._rank)
        self.padding: Same | int | Pads = _padding(padding, self._rank)
        self.ceil_mode = flag("ceil_mode", ceil_mode)
        for axis in range(self._rank or 1):
            self._check_padding(axis)

    def _check_padding(self, axis: int) -> None:
        """No padding is as wide as the window, so that a window without gaps never lies in it entirely."""
        if self.padding == "same":
            return
        window = self._axis(axis, None)
        if max(window.before, window.after) >= window.extent:
            raise InvalidRequest(
                f"padding of {self.type_name} must be smaller than the window: it is"
                f" ({window.before}, {window.after}) and the window spans {window.extent}",
                reason=Reason.PADDING_TOO_LARGE,
                metadata={
                    "before": str(window.before),
                    "after": str(window.after),
                    "extent": str(window.extent),
                },
                field="padding",
            )

    @property
    def rank(self) -> int | None:
        """Number of spatial axes; None, data of any rank, where every parameter is one for all axes."""
        return self._rank

    def _axis(self, axis: int, size: int | None) -> AxisWindow:
        kernel, stride = _at(self.kernel_size, axis), _at(self.stride, axis)
        dilation = _at(self._dilation, axis)
        if self.padding == "same":
            before, after = same_padding(size, kernel, stride, dilation)
        else:
            pads = self.padding
            before, after = (pads, pads) if isinstance(pads, int) else pads[axis]
        return AxisWindow(kernel, stride, dilation, before, after, self.ceil_mode)

    def window(self, sample: SampleShape) -> AxisWindow:
        """The window along the first spatial axis."""
        return self._axis(0, sample.rows)

    def windows(self, sample: SampleShape) -> tuple[AxisWindow, ...]:
        """The window along every spatial axis, `same` resolved for this sample."""
        return tuple(self._axis(axis, size) for axis, size in enumerate(sample.spatial))

    def output_sample(self, sample: SampleShape) -> SampleShape:
        """(channels, *output sizes); see `AxisWindow.output_size`."""
        check_spatial(self.type_name, sample)
        if self._rank is not None:
            check_rank("the window", self._rank, sample)
        return sample_of(sample.channels, output_sizes(self.windows(sample), sample, "the window"))

    def receptive_field(self, index: int | Sequence[int], input_shape: Sequence[int]) -> ReceptiveField:
        """The input positions that the neuron at `index` looks at, in its own channel."""
        sample = split_shape(input_shape, self._rank)[1]
        return windowed_field(self.windows(sample), index, sample, self.output_sample(sample))

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """What this kind of pooling has beside, in the canonical form."""

    def canonical(self) -> dict[str, Any]:
        """The contract's canonical form: integers where they hold for any rank, else lists."""
        padding: Any = self.padding
        if not isinstance(padding, int | str):
            padding = [list(pair) for pair in padding]
        return {
            "kernel_size": _listed(self.kernel_size),
            "stride": _listed(self.stride),
            "padding": padding,
            "ceil_mode": self.ceil_mode,
            **self._options(),
        }

    def __repr__(self) -> str:
        names = ["kernel_size", "stride", "padding", *self._own, "ceil_mode"]
        return f"{self.type_name}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class MaxPool(Pool):
    """The largest value of each window, channel by channel; NaN where the window has one.

    Padding never wins: it counts as minus infinity, and so does a window that, because of its dilation, looks
    at padding alone. PyTorch's semantics, with padding allowed up to the window's span less one.

    Args:
        kernel_size: sizes of the window, one integer (for data of any rank) or one per spatial axis.
        stride: step between neighbouring windows, likewise; `kernel_size` where not given.
        padding: an integer, one per axis, a (before, after) pair per axis, "same" or "valid"; smaller than
            the window, (kernel_size - 1) * dilation + 1.
        dilation: step between the positions that a window looks at, likewise.
        ceil_mode: rounds the number of windows up: a last one may reach beyond the padding, but never begins
            beyond the last element.

    Raises:
        InvalidRequest: a number breaks a rule; the message states it.
    """

    type_name: ClassVar[str] = "MaxPool"
    _own: ClassVar[tuple[str, ...]] = ("dilation",)

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] | None = None,
        padding: int | str | Sequence[int] | Sequence[Sequence[int]] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode)

    @property
    def dilation(self) -> PerAxis:
        """Step between the positions that a window looks at."""
        return self._dilation

    def _options(self) -> dict[str, Any]:
        return {"type": "max_pool", "dilation": _listed(self._dilation)}


class AvgPool(Pool):
    """The mean of each window, channel by channel. PyTorch's semantics.

    The sum is divided by the positions of the window: with `count_include_pad` those in the padding count,
    though not those that `ceil_mode` lets a last window have beyond it; without, real ones alone.

    Args:
        kernel_size: sizes of the window, one integer (for data of any rank) or one per spatial axis.
        stride: step between neighbouring windows, likewise; `kernel_size` where not given.
        padding: an integer, one per axis, a (before, after) pair per axis, "same" or "valid"; smaller than
            the window. Padding adds 0 to the sum.
        ceil_mode: rounds the number of windows up: a last one may reach beyond the padding, but never begins
            beyond the last element.
        count_include_pad: whether positions in the padding count.

    Raises:
        InvalidRequest: a number breaks a rule; the message states it.
    """

    type_name: ClassVar[str] = "AvgPool"
    _own: ClassVar[tuple[str, ...]] = ("count_include_pad",)

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] | None = None,
        padding: int | str | Sequence[int] | Sequence[Sequence[int]] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, padding, 1, ceil_mode)
        self.count_include_pad = flag("count_include_pad", count_include_pad)

    def _options(self) -> dict[str, Any]:
        return {"type": "avg_pool", "count_include_pad": self.count_include_pad}


def check_spatial(name: str, sample: SampleShape) -> None:
    """Refuses a vector, which has no axes for a window.

    Raises:
        InvalidRequest: `INVALID_SHAPE`.
    """
    if sample.vector:
        raise InvalidRequest(
            f"{name} takes feature maps with 1 to {MAX_RANK} spatial axes, the input is a vector: {sample}",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(sample)},
            field="sample_shape",
        )


def _rank_of(*values: Any) -> int | None:
    """The number of axes that a parameter is given for, of the first that is given axis by axis."""
    for value in values:
        if has_items(value) and not isinstance(value, str):
            rank = len(value)
            if not 1 <= rank <= MAX_RANK:
                raise InvalidRequest(
                    f"a window has 1 to {MAX_RANK} spatial axes, {value!r} is for {rank}",
                    reason=Reason.INVALID_PARAMETER,
                    metadata={"value": repr(value), "rank": str(rank)},
                    field="kernel_size",
                )
            return rank
    return None


def _per_axis(name: str, value: Any, rank: int | None) -> PerAxis:
    return integer(name, value, 1) if rank is None else per_axis(name, value, rank, 1)


def _padding(value: Any, rank: int | None) -> Same | int | Pads:
    pads = padding_of(value, rank or 1)
    return pads[0][0] if rank is None and pads != "same" else pads


def _at(value: PerAxis, axis: int) -> int:
    return value if isinstance(value, int) else value[axis]


def _listed(value: PerAxis) -> int | list[int]:
    return value if isinstance(value, int) else list(value)
