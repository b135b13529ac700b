"""What each ONNX operator becomes: one function for each, given the node and the draft, hands back a step.

`READERS` has them by name. The semantics are those of ONNX's operator schemas; where a layer here computes
only part of them, the function refuses the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import dtype_of
from convservice.imports.draft import Affine, Draft, Erf
from convservice.imports.onnx_node import OnnxNode, Unsupported
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    MaxPool,
)

Array = NDArray[Any]
Reader = Callable[[OnnxNode, Draft], str]


def _layer(make: Callable[[OnnxNode], Layer]) -> Reader:
    """A reader for an operator whose one input from the network is the first."""

    def read(node: OnnxNode, draft: Draft) -> str:
        return draft.add(node.name, make(node), [node.data(0)], node.where)

    return read


def _always(layer: Layer) -> Reader:
    """The same for one without attributes: always this layer."""

    def read(node: OnnxNode, draft: Draft) -> str:
        return draft.add(node.name, layer, [node.data(0)], node.where)

    return read


def _windows(node: OnnxNode, kernel: Sequence[int]) -> dict[str, Any]:
    """Stride, dilation and padding, as every operator with windows states them."""
    rank = len(kernel)
    stated: Sequence[int] = node.take("kernel_shape", kernel)
    if list(stated) != list(kernel):
        raise Unsupported(f"its attribute kernel_shape is {list(stated)}, its weight has {list(kernel)}")
    stride = tuple(node.take("strides", (1,) * rank))
    dilation = tuple(node.take("dilations", (1,) * rank))
    pads = list(node.take("pads", (0,) * 2 * rank))
    auto: str = node.take("auto_pad", "NOTSET")
    padding: Any = tuple(zip(pads[:rank], pads[rank:], strict=True))
    if auto == "SAME_UPPER":
        padding = "same"
    elif auto == "SAME_LOWER":
        if set(stride) != {1}:
            raise Unsupported(
                "its attribute auto_pad is 'SAME_LOWER' with a stride beyond 1, which pads by the size of the"
                " input: state the pads"
            )
        totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple((total - total // 2, total // 2) for total in totals)
    elif auto == "VALID":
        padding = 0
    elif auto != "NOTSET":
        raise Unsupported(f"its attribute auto_pad is {auto!r}")
    return {"stride": stride, "dilation": dilation, "padding": padding}


def _conv(node: OnnxNode) -> Layer:
    weight, bias = node.constant(1, "weight"), node.optional(2)
    return Conv(weight, bias, groups=node.take("group", 1), **_windows(node, weight.shape[2:]))


def _conv_transpose(node: OnnxNode) -> Layer:
    weight, bias = node.constant(1, "weight"), node.optional(2)
    node.demand("auto_pad", "NOTSET", "VALID")
    if node.take("output_shape") is not None:
        raise Unsupported("its attribute output_shape fixes the size of the output: state pads instead")
    added = tuple(node.take("output_padding", (0,) * (weight.ndim - 2)))
    options = _windows(node, weight.shape[2:])
    return ConvTranspose(weight, bias, groups=node.take("group", 1), output_padding=added, **options)


def _max_pool(node: OnnxNode) -> Layer:
    node.demand("storage_order", 0, 1)  # of the indices alone
    kernel = tuple(node.required("kernel_shape"))
    ceil_mode = bool(node.take("ceil_mode", 0))
    return MaxPool(kernel, ceil_mode=ceil_mode, **_windows(node, kernel))


def _average_pool(node: OnnxNode) -> Layer:
    kernel = tuple(node.required("kernel_shape"))
    ceil_mode, counted = bool(node.take("ceil_mode", 0)), bool(node.take("count_include_pad", 0))
    options = _windows(node, kernel)
    if set(options.pop("dilation")) != {1}:
        raise Unsupported("its attribute dilations is not 1: an average here has no gaps")
    return AvgPool(kernel, ceil_mode=ceil_mode, count_include_pad=counted, **options)


def _reduced(layer: Layer) -> Reader:
    """A reduction over all spatial axes: global pooling, as a vector where no axis is kept."""

    def read(node: OnnxNode, draft: Draft) -> str:
        source = node.data(0)
        rank = draft.rank(source)
        axes: Any = node.take("axes")
        axes = node.constant(1, "axes") if axes is None else axes
        keep = bool(node.take("keepdims", 1))
        node.demand("noop_with_empty_axes", 0)
        _demand_spatial(axes, rank)
        step = draft.add(node.name, layer, [source], node.where)
        return step if keep else draft.add(f"{node.name}.flat", Flatten(), [step], node.where)

    return read


def _squeeze(node: OnnxNode, draft: Draft) -> str:
    source, axes = node.data(0), node.take("axes")
    _demand_spatial(node.constant(1, "axes") if axes is None else axes, draft.rank(source))
    return draft.add(node.name, Flatten(), [source], node.where)


def _demand_spatial(axes: Any, rank: int | None) -> None:
    wanted = [int(axis) for axis in np.atleast_1d(axes)]
    if not rank:
        raise Unsupported(f"its axes are {wanted}, and its input has no known spatial axes")
    if sorted(axis % (rank + 2) for axis in wanted) != list(range(2, rank + 2)):
        raise Unsupported(f"its axes are {wanted}; the spatial ones are {list(range(2, rank + 2))}")


def _leaky_relu(node: OnnxNode) -> Layer:
    return Activation("leaky_relu", float(node.take("alpha", np.float32(0.01))))


def _gelu(node: OnnxNode) -> Layer:
    node.demand("approximate", "none")
    return Activation("gelu")


def _flatten(node: OnnxNode) -> Layer:
    node.demand("axis", 1)
    return Flatten()


def _reshape(node: OnnxNode) -> Layer:
    shape = [int(size) for size in node.constant(1, "shape")]
    node.demand("allowzero", 0, 1)
    if len(shape) != 2 or shape[1] == 0:
        raise Unsupported(f"its shape is {shape}; only vectors are made here, of a shape such as (0, -1)")
    return Flatten()


def _batch_norm(node: OnnxNode, draft: Draft) -> str:
    node.demand("training_mode", 0)
    node.demand("spatial", 1)
    epsilon = float(node.take("epsilon", np.float32(1e-5)))
    node.take("momentum")  # of training
    names = ("scale", "bias", "mean", "variance")
    given = [node.constant(position, name) for position, name in enumerate(names, 1)]
    scale, bias, mean, variance = (array.astype(np.float64) for array in given)
    step = Affine.batch_norm(
        gamma=scale, beta=bias, mean=mean, variance=variance, epsilon=epsilon, dtype=given[0].dtype
    )
    return draft.add(node.name, step, [node.data(0)], node.where)


def _gemm(node: OnnxNode) -> Layer:
    alpha, beta = float(node.take("alpha", 1.0)), float(node.take("beta", 1.0))
    node.demand("transA", 0)
    given, bias = node.constant(1, "weight"), node.optional(2)
    weight = given if node.take("transB", 0) else given.T
    weight = weight if alpha == 1 else (weight.astype(np.float64) * alpha).astype(given.dtype)
    if bias is None:
        return Linear(weight)
    shift = np.broadcast_to(bias, (1, len(weight)))[0]
    return Linear(weight, shift if beta == 1 else (shift.astype(np.float64) * beta).astype(given.dtype))


def _matmul(node: OnnxNode, draft: Draft) -> str:
    weight = node.constant(1, "weight")
    if weight.ndim != 2 or draft.rank(node.data(0)):
        raise Unsupported(
            f"it multiplies with an array of shape {weight.shape}; vectors with a matrix are known"
        )
    return draft.add(node.name, Linear(weight.T), [node.data(0)], node.where)


def _add(node: OnnxNode, draft: Draft) -> str:
    fixed = [position for position in range(len(node.inputs)) if node.is_constant(position)]
    if not fixed:
        sources = [node.data(position) for position in range(len(node.inputs))]
        return draft.add(node.name, Add(), sources, node.where) if len(sources) > 1 else sources[0]
    return _with_constant(node, draft, fixed, lambda number: (np.ones(1), number))


def _mul(node: OnnxNode, draft: Draft) -> str:
    fixed = [position for position in range(len(node.inputs)) if node.is_constant(position)]
    if fixed:
        return _with_constant(node, draft, fixed, lambda number: (number, np.zeros(1)))
    sources = [node.data(0), node.data(1)]
    for gate, source in (sources, sources[::-1]):
        step = draft.step(gate)
        if step is not None and step.what == Activation("sigmoid") and step.inputs == (source,):
            return draft.add(node.name, Activation("silu"), [source], node.where)
        if (factor := _gelu_factor(draft, gate, source)) is not None:
            activated = draft.add(node.name, Activation("gelu"), [source], node.where)
            return draft.add(f"{node.name}.scale", factor, [activated], node.where)
    raise Unsupported(
        "it multiplies two feature maps, and only x with Sigmoid(x), SiLU, and x with"
        " 1 + Erf(x / sqrt 2), GELU, are known"
    )


def _gelu_factor(draft: Draft, gate: str, source: str) -> Affine | None:
    """f where `gate` is f (1 + erf(x / sqrt 2)) / 2 and x is `source`, so that x * gate is f * GELU(x)."""
    scale, shift = 1.0, 0.0
    step = draft.step(gate)
    while step is not None and isinstance(step.what, Affine):
        if step.what.scale.size > 1 or step.what.shift.size > 1:
            return None
        shift += scale * step.what.shift.item()
        scale *= step.what.scale.item()
        step = draft.step(step.inputs[0])
    if step is None or not isinstance(step.what, Erf) or scale != shift:
        return None
    inner = draft.step(step.inputs[0])
    if inner is None or not isinstance(inner.what, Affine) or inner.inputs != (source,):
        return None
    affine, rounding = inner.what, 4 * dtype_of(inner.what.dtype).roundoff
    if (np.abs(affine.scale * math.sqrt(2) - 1) > rounding).any() or affine.shift.any():
        return None
    return Affine.of(2 * scale, 0.0, affine.dtype)


def _div(node: OnnxNode, draft: Draft) -> str:
    if node.is_constant(0) or not node.is_constant(1):
        raise Unsupported("it divides by a feature map; a constant divisor is known")
    if not node.constant(1, "divisor").all():
        raise Unsupported("its divisor has a 0")
    return _with_constant(node, draft, [1], lambda number: (1 / number, np.zeros(1)))


def _erf(node: OnnxNode, draft: Draft) -> str:
    return draft.add(node.name, Erf(), [node.data(0)], node.where)


def _with_constant(
    node: OnnxNode, draft: Draft, fixed: Sequence[int], numbers: Callable[[Array], tuple[Array, Array]]
) -> str:
    """One input from the network and one constant: a scale and a shift of every channel."""
    if len(node.inputs) != 2 or len(fixed) != 1:
        raise Unsupported("it takes more than one constant, or more than two inputs")
    source, value = node.data(1 - fixed[0]), node.constant(fixed[0], "constant")
    rank = draft.rank(source)
    if value.size > 1:
        if rank is None:
            raise Unsupported("how many spatial axes its input has is not known")
        full = value.reshape((1,) * (rank + 2 - value.ndim) + value.shape)
        if math.prod(full.shape) != full.shape[1] or full.ndim != rank + 2:
            raise Unsupported(f"its constant has shape {value.shape}: one number for each channel is known")
    scale, shift = numbers(value.ravel().astype(np.float64))
    return draft.add(node.name, Affine.of(scale, shift, value.dtype), [source], node.where)


def _identity(node: OnnxNode, _: Draft) -> str:
    for name in ("ratio", "seed", "is_test"):
        node.take(name)  # of training
    if len(node.inputs) > 2 and node.constant(2, "training_mode"):
        raise Unsupported("its training_mode is true")
    return node.data(0)


READERS: dict[str, Reader] = {
    "Add": _add,
    "AveragePool": _layer(_average_pool),
    "BatchNormalization": _batch_norm,
    "Conv": _layer(_conv),
    "ConvTranspose": _layer(_conv_transpose),
    "Div": _div,
    "Dropout": _identity,
    "Erf": _erf,
    "Flatten": _layer(_flatten),
    "Gelu": _layer(_gelu),
    "Gemm": _layer(_gemm),
    "GlobalAveragePool": _always(GlobalAvgPool()),
    "GlobalMaxPool": _always(GlobalMaxPool()),
    "Identity": _identity,
    "LeakyRelu": _layer(_leaky_relu),
    "MatMul": _matmul,
    "MaxPool": _layer(_max_pool),
    "Mul": _mul,
    "ReduceMax": _reduced(GlobalMaxPool()),
    "ReduceMean": _reduced(GlobalAvgPool()),
    "Relu": _always(Activation("relu")),
    "Reshape": _layer(_reshape),
    "Sigmoid": _always(Activation("sigmoid")),
    "Squeeze": _squeeze,
    "Sum": _add,
    "Tanh": _always(Activation("tanh")),
}
"""By operator, in the order of the alphabet."""
