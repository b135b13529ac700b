"""What every layer with weights checks: thresholds, groups, the input's channels and axes."""

from __future__ import annotations

from collections.abc import Sequence

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import SampleShape
from convservice.tensors import Tensor


def check_thresholds(bias: Tensor | None, weight: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    """Checks that thresholds have one of `shapes` and the weight's dtype.

    Raises:
        InvalidRequest: `INVALID_SHAPE` or `DATA_TYPE_MISMATCH`.
    """
    if bias is None:
        return
    if bias.shape not in shapes:
        raise InvalidRequest(
            f"bias must have shape {' or '.join(map(str, shapes))}, one threshold a filter, not {bias.shape}",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(bias.shape), "out_channels": str(shapes[0][0])},
            field="bias",
        )
    if bias.dtype != weight.dtype:
        raise InvalidRequest(
            f"bias must have the weight's dtype {weight.dtype}, not {bias.dtype}; convert it first, for"
            f" example bias.astype('{weight.dtype}')",
            reason=Reason.DATA_TYPE_MISMATCH,
            metadata={"bias": bias.dtype.name, "weight": weight.dtype.name},
            field="bias",
        )


def check_groups(name: str, channels: int, groups: int) -> None:
    """Checks that the weight's `channels` (called `name`) fall into `groups`.

    Raises:
        InvalidRequest: `CHANNEL_MISMATCH`.
    """
    if channels % groups:
        raise InvalidRequest(
            f"{name} must be divisible by groups: weight has {channels}"
            f" {'filters' if name == 'out_channels' else 'input channels'}, groups is {groups}",
            reason=Reason.CHANNEL_MISMATCH,
            metadata={name: str(channels), "groups": str(groups)},
            field="groups",
        )


def check_rank(what: str, rank: int, sample: SampleShape) -> None:
    """Checks that `what`, which has `rank` spatial axes, is given a sample that has as many.

    Raises:
        InvalidRequest: `INVALID_SHAPE`.
    """
    if sample.rank != rank:
        raise InvalidRequest(
            f"{what} has {rank} spatial axes, the input has {sample.rank}: {sample}",
            reason=Reason.INVALID_SHAPE,
            metadata={"rank": str(rank), "shape": str(sample)},
            field="sample_shape",
        )


def check_channels(sample: SampleShape, per_group: int, groups: int) -> None:
    """Checks that a sample has the channels that a weight was made for.

    Raises:
        InvalidRequest: `CHANNEL_MISMATCH`.
    """
    if sample.channels != per_group * groups:
        raise InvalidRequest(
            f"weight has {per_group} input channels per group, the input has"
            f" {sample.channels} channels in {groups} group{'s' if groups > 1 else ''}",
            reason=Reason.CHANNEL_MISMATCH,
            metadata={
                "channels": str(sample.channels),
                "expected": str(per_group * groups),
                "groups": str(groups),
            },
            field="sample_shape",
        )


def digest_of(tensor: Tensor | None) -> str | None:
    """A tensor's digest in a layer's canonical form."""
    return None if tensor is None else tensor.digest.hex()


def group_channels(channel: int, out_channels: int, in_channels: int, groups: int) -> range:
    """The input channels in the group of an output channel."""
    each = in_channels // groups
    first = channel // (out_channels // groups) * each
    return range(first, first + each)
