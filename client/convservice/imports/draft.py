"""A network while it is read from elsewhere, and what makes it smaller than it was there.

A reader adds steps: layers, and *affine* steps, which scale and shift every channel (batch normalization, a
bias added on its own) and are no layers here. `Draft.network` folds an affine step into the layer that it
follows, in float64 and rounded once, leaves it out where it changes nothing, or makes it a depthwise
convolution of kernel 1; then it fuses activations into the layers that they follow, and leaves out what no
output needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convservice.canonical import layer_from_canonical
from convservice.errors import InvalidRequest, Reason
from convservice.layers import Activation, Add, Conv, ConvTranspose, Flatten, Layer, Linear, LocallyConnected
from convservice.network import Network
from convservice.nodes import INPUT, Node
from convservice.tensors import Tensor

Floats = NDArray[np.float64]
Weighted = Conv | ConvTranspose | Linear | LocallyConnected


@dataclass(frozen=True)
class Affine:
    """y = scale * x + shift, channel by channel.

    Attributes:
        scale: (channels,), or (1,) for one number for all.
        shift: likewise.
        dtype: of the numbers where they came from.
    """

    scale: Floats
    shift: Floats
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, scale: ArrayLike, shift: ArrayLike, dtype: np.dtype[Any]) -> Affine:
        """From numbers of any type."""
        factors = np.atleast_1d(np.asarray(scale, np.float64))
        return cls(factors, np.atleast_1d(np.asarray(shift, np.float64)), dtype)

    @classmethod
    def batch_norm(
        cls,
        *,
        gamma: Floats,
        beta: Floats,
        mean: Floats,
        variance: Floats,
        epsilon: float,
        dtype: np.dtype[Any],
    ) -> Affine:
        """Batch normalization with the statistics that training left.

        Raises:
            InvalidRequest: a variance with epsilon is not above 0.
        """
        if not (variance + epsilon > 0).all():
            raise InvalidRequest(
                f"a variance and epsilon, {epsilon}, are together not above 0",
                reason=Reason.INVALID_PARAMETER,
                field="variance",
            )
        scale = gamma / np.sqrt(variance + epsilon)
        return cls(scale, beta - mean * scale, dtype)

    @property
    def changes_nothing(self) -> bool:
        """Whether y = x."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())


@dataclass(frozen=True)
class Erf:
    """The error function of every number: part of a GELU that is written out, and no layer on its own."""


What = Layer | Affine | Erf


@dataclass(frozen=True)
class Step:
    """One step of a draft.

    Attributes:
        id: unique in the draft.
        what: what it does.
        inputs: ids of earlier steps, or `"input"`.
        where: how messages name it.
    """

    id: str
    what: What
    inputs: tuple[str, ...]
    where: str


class Draft:
    """A network while it is read.

    Args:
        rank: spatial axes of the input, 0 for vectors; None where that is not known.
    """

    def __init__(self, rank: int | None) -> None:
        self._steps: list[Step] = []
        self._ranks: dict[str, int | None] = {INPUT: rank}

    def rank(self, step: str) -> int | None:
        """Spatial axes of a step's data."""
        return self._ranks[step]

    def step(self, step_id: str) -> Step | None:
        """The step of that id; None for the input."""
        return next((step for step in self._steps if step.id == step_id), None)

    def add(self, name: str, what: What, inputs: Sequence[str], where: str) -> str:
        """Adds a step, named as closely to `name` as ids may be; hands back its id."""
        step_id = unique_id(name, self._ranks)
        self._steps.append(Step(step_id, what, tuple(inputs), where))
        own = what.rank if isinstance(what, Weighted) else None
        flat = isinstance(what, Flatten)
        self._ranks[step_id] = 0 if flat else own if own is not None else self._ranks[inputs[0]]
        return step_id

    def network(self, outputs: Mapping[str, str]) -> Network:
        """The network, with these outputs: name to step.

        Raises:
            InvalidRequest: `UNKNOWN_LAYER` for an affine step that no layer can take on, and for an error
                function outside a GELU; what `Network` raises.
        """
        steps = self._needed(self._steps, outputs)
        steps, names = _joined(steps, dict(outputs), _folded)
        steps, names = _without_identities(steps, names)
        steps = [self._as_layer(step) for step in steps]
        steps, names = _joined(steps, names, _fused)
        nodes = [Node(step.id, step.what, step.inputs) for step in steps if isinstance(step.what, Layer)]
        return Network(nodes, names)

    @staticmethod
    def _needed(steps: Sequence[Step], outputs: Mapping[str, str]) -> list[Step]:
        wanted, kept = set(outputs.values()), list[Step]()
        for step in reversed(steps):
            if step.id in wanted:
                wanted.update(step.inputs)
                kept.append(step)
        return kept[::-1]

    def _as_layer(self, step: Step) -> Step:
        """An affine step that was not folded as a depthwise convolution."""
        if isinstance(step.what, Layer):
            return step
        if isinstance(step.what, Erf):
            raise InvalidRequest(
                f"{step.where}: the error function is known within GELU, x (1 + erf(x / sqrt 2)) / 2, alone",
                reason=Reason.UNKNOWN_LAYER,
            )
        affine, rank = step.what, self._ranks[step.id]
        channels = max(len(affine.scale), len(affine.shift))
        if not rank or channels < 2:
            raise InvalidRequest(
                f"{step.where}: it scales or shifts what no convolution or linear layer gives, and not a"
                " known number of channels of a feature map",
                reason=Reason.UNKNOWN_LAYER,
            )
        weight = np.broadcast_to(affine.scale, channels).reshape(channels, 1, *(1,) * rank)
        shift = np.broadcast_to(affine.shift, channels)
        layer = Conv(weight.astype(affine.dtype), shift.astype(affine.dtype), groups=channels)
        return replace(step, what=layer)


def unique_id(name: str, taken: Mapping[str, object]) -> str:
    """`name` as an id that is not taken: other characters than an id has become `_`, a slash a dot."""
    plain = (
        re.sub(r"[^A-Za-z0-9_.-]", "_", name.strip("/").replace("/", ".").replace("::", "."))[-56:] or "layer"
    )
    found, count = plain, 1
    while found in taken:
        count += 1
        found = f"{plain}_{count}"
    return found


def _joined(steps: Sequence[Step], outputs: dict[str, str], join: Any) -> tuple[list[Step], dict[str, str]]:
    """Steps of which some are one with the only step that they follow.

    Args:
        steps: in topological order.
        outputs: name to step.
        join: given the earlier and the later thing, hands back what does both, or None.
    """
    uses = Counter(source for step in steps for source in step.inputs)
    uses.update(outputs.values())
    found: dict[str, Step] = {}
    instead: dict[str, str] = {}
    for step in steps:
        step = replace(step, inputs=tuple(instead.get(source, source) for source in step.inputs))
        before = found.get(step.inputs[0])
        alone = len(step.inputs) == 1 and before is not None and uses[before.id] == 1
        both = join(before.what, step.what) if alone and before is not None else None
        if both is None or before is None:
            found[step.id] = step
            continue
        found[before.id] = replace(before, what=both)
        instead[step.id] = before.id
        uses[before.id] = uses[step.id]
    return list(found.values()), {name: instead.get(target, target) for name, target in outputs.items()}


def _without_identities(
    steps: Sequence[Step], outputs: Mapping[str, str]
) -> tuple[list[Step], dict[str, str]]:
    """The steps without those that change nothing; one that follows the input stays."""
    kept, instead = list[Step](), dict[str, str]()
    for step in steps:
        step = replace(step, inputs=tuple(instead.get(source, source) for source in step.inputs))
        if isinstance(step.what, Affine) and step.what.changes_nothing and step.inputs[0] != INPUT:
            instead[step.id] = step.inputs[0]
        else:
            kept.append(step)
    return kept, {name: instead.get(target, target) for name, target in outputs.items()}


def _folded(before: What, after: What) -> Layer | Affine | None:
    """A layer and the affine step after it as one."""
    if not isinstance(after, Affine):
        return None
    if isinstance(before, Affine):
        return Affine(before.scale * after.scale, before.shift * after.scale + after.shift, before.dtype)
    if not isinstance(before, Conv | ConvTranspose | Linear) or before.activation.function != "linear":
        return None
    outs = before.out_features if isinstance(before, Linear) else before.out_channels
    if not {len(after.scale), len(after.shift)} <= {1, outs}:
        return None
    scale, shift = np.broadcast_to(after.scale, outs), np.broadcast_to(after.shift, outs)
    weight = before.weight.astype(np.float64)
    if isinstance(before, ConvTranspose):
        # (in_channels, out_channels / groups, *kernel): the inputs of a group meet the outputs of that group
        groups, kernel = before.groups, weight.shape[2:]
        parts = weight.reshape(groups, -1, outs // groups, *kernel)
        weight = (parts * scale.reshape(groups, 1, -1, *(1,) * len(kernel))).reshape(weight.shape)
    else:
        weight = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    bias = shift if before.bias is None else before.bias.astype(np.float64) * scale + shift
    own = before.weight.dtype
    return _with(before, weight=Tensor.of(weight.astype(own)), bias=Tensor.of(bias.astype(own)))


def _fused(before: What, after: What) -> Layer | None:
    """A layer and the activation after it as one."""
    if not isinstance(after, Activation) or not isinstance(before, Weighted | Add):
        return None
    return _with(before, activation=after) if before.activation.function == "linear" else None


def _with(layer: Weighted | Add, **changes: Tensor | Activation) -> Layer:
    """The layer with other weights or another activation."""
    form, tensors = layer.canonical(), {tensor.digest.hex(): tensor for tensor in layer.tensors}
    for name, value in changes.items():
        if isinstance(value, Activation):
            form[name] = value.canonical_function()
        else:
            form[name] = value.digest.hex()
            tensors[value.digest.hex()] = value
    return layer_from_canonical(form, tensors.__getitem__)
