"""What users pass for a layer's parameters, in its one form.

Given anything (numbers of any kind, arrays, texts) it hands back plain integers and tuples, or refuses them
by name, with the value and the rule.
"""

from __future__ import annotations

from typing import Any

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_SIZE, Pads, Same


def integer(name: str, value: Any, minimum: int, maximum: int = MAX_SIZE) -> int:
    """`value` as an int between `minimum` and `maximum`.

    Raises:
        InvalidRequest: `INVALID_PARAMETER` for anything else, NaN, bool and fractions included.
    """
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        number = None
    if number is None or isinstance(value, bool) or not minimum <= number <= maximum:
        raise InvalidRequest(
            f"{name} must be an integer from {minimum} to {maximum}, not {value!r}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": name, "value": repr(value), "minimum": str(minimum), "maximum": str(maximum)},
            field=name,
        )
    return int(number)


def per_axis(name: str, value: Any, rank: int, minimum: int) -> tuple[int, ...]:
    """One integer per spatial axis from one number or a sequence of `rank` numbers.

    Raises:
        InvalidRequest: `INVALID_PARAMETER` for a wrong count or a value below `minimum`.
    """
    if not has_items(value):
        return (integer(name, value, minimum),) * rank
    values: tuple[Any, ...] = tuple(value)
    if isinstance(value, str) or len(values) != rank:
        raise InvalidRequest(
            f"{name} must be one integer or one for each of the {rank} spatial axes, not {value!r}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": name, "value": repr(value), "rank": str(rank)},
            field=name,
        )
    return tuple(integer(name, item, minimum) for item in values)


def has_items(value: Any) -> bool:
    """Whether `value` has a length; an array without axes has the attribute and no length."""
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) != 0


def padding_of(value: Any, rank: int) -> Same | Pads:
    """Padding in its one form: "same", or a (before, after) pair per spatial axis.

    Takes what the SDK takes: an int, one int per axis, a (before, after) pair per axis, "same" or "valid".

    Raises:
        InvalidRequest: `INVALID_PARAMETER` for anything else.
    """
    if isinstance(value, str):
        if value == "same":
            return "same"
        if value == "valid":
            return ((0, 0),) * rank
        raise InvalidRequest(
            f"padding must be 'same', 'valid', an integer, one per axis or a (before, after) pair per axis,"
            f" not {value!r}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": "padding", "value": repr(value)},
            field="padding",
        )
    if not has_items(value):
        amount = integer("padding", value, 0)
        return ((amount, amount),) * rank
    values: tuple[Any, ...] = tuple(value)
    if len(values) == rank and all(has_items(item) and len(item) == 2 for item in values):
        return tuple((integer("padding", b, 0), integer("padding", a, 0)) for b, a in values)
    return tuple((amount, amount) for amount in per_axis("padding", value, rank, 0))


def flag(name: str, value: Any) -> bool:
    """`value`, which must be a bool.

    Raises:
        InvalidRequest: `INVALID_PARAMETER`.
    """
    if not isinstance(value, bool):
        raise InvalidRequest(
            f"{name} must be True or False, not {value!r}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": name, "value": repr(value)},
            field=name,
        )
    return value
