"""One node of an ONNX graph, as what reads it asks for its attributes and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


class Unsupported(Exception):
    """What a node asks that no layer computes; the message ends a sentence that begins with the node."""


class OnnxNode:
    """One node of the graph, with its attributes as Python values.

    Every attribute must be asked for: one that nobody knows could change what the node computes.

    Args:
        proto: the node.
        index: its index in the graph.
        constants: value name to array.
        steps: value name to the draft's step that gives it.
    """

    def __init__(
        self, proto: Any, index: int, constants: Mapping[str, Array], steps: Mapping[str, str]
    ) -> None:
        from onnx.helper import get_attribute_value

        self.kind: str = proto.op_type
        self.name: str = proto.name or f"{proto.op_type.lower()}{index}"
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        shown = f", name {proto.name!r}" if proto.name else ""
        domain = f"{proto.domain}." if proto.domain not in ("", "ai.onnx") else ""
        self.where = f"node {index} ({domain}{proto.op_type}{shown})"
        self.custom = bool(domain)
        self._attributes: dict[str, Any] = {one.name: get_attribute_value(one) for one in proto.attribute}
        self._constants = constants
        self._steps = steps

    def take(self, name: str, default: Any = None) -> Any:
        """An attribute's value, bytes as text; `default` where it is not given."""
        value = self._attributes.pop(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def required(self, name: str) -> Any:
        """An attribute's value, which must be given."""
        value = self.take(name)
        if value is None:
            raise Unsupported(f"its attribute {name} is not given")
        return value

    def demand(self, name: str, *allowed: Any) -> None:
        """Refuses an attribute with any other value than these; one that is not given has the first."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise Unsupported(f"its attribute {name} is {value!r}, and only {wanted} is computed here")

    def end(self) -> None:
        """Refuses attributes that nobody asked for."""
        for name, value in self._attributes.items():
            raise Unsupported(f"its attribute {name}, which is {value!r}, is not known here")

    def data(self, position: int) -> str:
        """The step that gives an input which depends on the network's."""
        value = self._steps.get(self._input(position))
        if value is None:
            raise Unsupported(f"its input {position}, {self._input(position)!r}, is a constant")
        return value

    def is_constant(self, position: int) -> bool:
        """Whether an input is a constant."""
        return self._input(position) in self._constants

    def constant(self, position: int, what: str) -> Array:
        """The value of an input that must be a constant."""
        found = self.optional(position)
        if found is None:
            raise Unsupported(f"its {what}, input {position}, is no constant")
        return found

    def optional(self, position: int) -> Array | None:
        """The value of a constant input; None where there is no such input.

        Raises:
            Unsupported: it is there and no constant.
        """
        name = self._input(position)
        if name and name not in self._constants:
            raise Unsupported(f"its input {position}, {name!r}, is no constant")
        return self._constants[name] if name else None

    def _input(self, position: int) -> str:
        return self.inputs[position] if position < len(self.inputs) else ""
