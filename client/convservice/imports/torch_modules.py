"""Networks from PyTorch modules.

Given a `torch.nn.Sequential`, whatever is nested in it, or a single module, `from_torch` hands back the
`Network` that computes what the module does in its evaluation mode: batch normalization folded, activations
fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import dtype_of
from convservice.errors import ConvServiceError, InvalidRequest, MissingPackage, Reason
from convservice.imports.draft import Affine, Draft
from convservice.layers import (
    Activation,
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
from convservice.network import Network
from convservice.nodes import INPUT


def from_torch(module: Any) -> Network:
    """The network that a PyTorch module is in its evaluation mode.

    Taken are Sequential, nested as deep as wanted, and in it Conv1d to 3d, ConvTranspose1d to 3d, MaxPool,
    AvgPool, AdaptiveAvgPool and AdaptiveMaxPool to size 1, ReLU, LeakyReLU, Sigmoid, Tanh, GELU, SiLU,
    BatchNorm (folded into the convolution before it, in float64 and rounded once), Flatten, Linear, Dropout
    and Identity. Layers are named as the module names them. Weights are copied.

    Args:
        module: a `torch.nn.Module`; `eval()` must have been called where there is batch normalization.

    Raises:
        MissingPackage: torch is not installed.
        InvalidRequest: `UNKNOWN_LAYER` for a module that no layer computes, naming it and its index among all
            modules in a row; what layers and networks raise.
    """
    try:
        torch = import_module("torch")
    except ImportError as exc:
        raise MissingPackage.of("torch", "torch") from exc
    if not isinstance(module, torch.nn.Module):
        raise InvalidRequest(
            f"from_torch takes a torch.nn.Module, not {type(module).__name__}", reason=Reason.INVALID_NETWORK
        )
    parts = list(_in_a_row(torch, module, ""))
    draft, end = Draft(next((rank for _, part in parts if (rank := _rank(part)) is not None), None)), INPUT
    for index, (name, part) in enumerate(parts):
        where = f"module {index} ({type(part).__name__}, name {name!r})"
        try:
            what = _read(part)
        except _Unsupported as exc:
            raise InvalidRequest(
                f"{where}: {exc}", reason=Reason.UNKNOWN_LAYER, metadata={"module": type(part).__name__}
            ) from exc
        except ConvServiceError as exc:
            raise InvalidRequest(f"{where}: {exc.message}", reason=exc.reason, metadata=exc.metadata) from exc
        if what is not None:
            end = draft.add(name, what, [end], where)
    if end == INPUT:
        raise InvalidRequest("the module has no layer that computes", reason=Reason.INVALID_NETWORK)
    return draft.network({"output": end})


class _Unsupported(Exception):
    """What a module does that no layer computes."""


def _in_a_row(torch: Any, module: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The modules that a Sequential runs one after another, with their names."""
    if isinstance(module, torch.nn.Sequential):
        for child_name, child in module.named_children():
            yield from _in_a_row(torch, child, f"{name}.{child_name}" if name else child_name)
    else:
        yield name or "layer", module


def _rank(module: Any) -> int | None:
    """Spatial axes of a module's data, as its name says; None where it does not."""
    kind = type(module).__name__
    if kind == "Linear":
        return 0
    return int(kind[-2]) if kind.endswith(("1d", "2d", "3d")) else None


def _read(module: Any) -> Layer | Affine | None:
    """What one module becomes; None for one that changes nothing."""
    kind = type(module).__name__
    plain = kind[:-2] if kind.endswith(("1d", "2d", "3d")) else kind
    read = _READERS.get(plain)
    if read is None or not type(module).__module__.startswith("torch.nn."):
        raise _Unsupported(f"no layer computes it; known are Sequential, {', '.join(_READERS)}")
    return read(module)


def _array(tensor: Any) -> NDArray[Any]:
    """A tensor as an array of its own type."""
    plain = tensor.detach().cpu().contiguous()
    if str(plain.dtype) == "torch.bfloat16":
        bits: NDArray[Any] = plain.view(import_module("torch").int16).numpy()
        return bits.view(dtype_of("bfloat16").numpy)
    found: NDArray[Any] = plain.numpy()
    return found


def _optional(tensor: Any) -> NDArray[Any] | None:
    return None if tensor is None else _array(tensor)


def _conv(module: Any) -> Layer:
    if module.padding_mode not in ("zeros", "reflect", "replicate"):
        raise _Unsupported(f"its padding_mode is {module.padding_mode!r}")
    return Conv(
        _array(module.weight),
        _optional(module.bias),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def _conv_transpose(module: Any) -> Layer:
    return ConvTranspose(
        _array(module.weight),
        _optional(module.bias),
        stride=module.stride,
        padding=module.padding,
        output_padding=module.output_padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def _per_axis(module: Any, *names: str) -> dict[str, tuple[int, ...]]:
    """Attributes that are one number for all axes, or one for each, as one for each."""
    rank = _rank(module) or 1
    values = {name: getattr(module, name) for name in names}
    return {
        name: (value,) * rank if isinstance(value, int) else tuple(value) for name, value in values.items()
    }


def _max_pool(module: Any) -> Layer:
    if module.return_indices:
        raise _Unsupported("it returns indices, and only values are computed")
    options = _per_axis(module, "kernel_size", "stride", "padding", "dilation")
    return MaxPool(options.pop("kernel_size"), ceil_mode=module.ceil_mode, **options)


def _avg_pool(module: Any) -> Layer:
    if getattr(module, "divisor_override", None) is not None:
        raise _Unsupported(f"its divisor_override is {module.divisor_override}")
    options = _per_axis(module, "kernel_size", "stride", "padding")
    return AvgPool(
        options.pop("kernel_size"),
        ceil_mode=module.ceil_mode,
        count_include_pad=module.count_include_pad,
        **options,
    )


def _adaptive(layer: Layer) -> Callable[[Any], Layer]:
    def read(module: Any) -> Layer:
        if set(np.atleast_1d(np.asarray(module.output_size, object)).tolist()) != {1}:
            raise _Unsupported(f"its output_size is {module.output_size}, and only 1 is known")
        if getattr(module, "return_indices", False):
            raise _Unsupported("it returns indices, and only values are computed")
        return layer

    return read


def _batch_norm(module: Any) -> Affine:
    if module.training or module.running_mean is None:
        raise _Unsupported("it normalizes by each batch's own statistics: call eval() on the module first")
    mean, variance = _array(module.running_mean), _array(module.running_var)
    gamma = np.ones(len(mean)) if module.weight is None else _array(module.weight)
    beta = np.zeros(len(mean)) if module.bias is None else _array(module.bias)
    return Affine.batch_norm(
        gamma=gamma.astype(np.float64),
        beta=beta.astype(np.float64),
        mean=mean.astype(np.float64),
        variance=variance.astype(np.float64),
        epsilon=module.eps,
        dtype=mean.dtype,
    )


def _gelu(module: Any) -> Layer:
    if module.approximate != "none":
        raise _Unsupported(f"its approximate is {module.approximate!r}, and only 'none' is known")
    return Activation("gelu")


def _flatten(module: Any) -> Layer:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise _Unsupported(
            f"it flattens axes {module.start_dim} to {module.end_dim}, and only 1 to -1 are known"
        )
    return Flatten()


def _nothing(_: Any) -> None:
    """A module that changes nothing when it is evaluated."""


_READERS: dict[str, Callable[[Any], Layer | Affine | None]] = {
    "AdaptiveAvgPool": _adaptive(GlobalAvgPool()),
    "AdaptiveMaxPool": _adaptive(GlobalMaxPool()),
    "AvgPool": _avg_pool,
    "BatchNorm": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Dropout": _nothing,
    "Flatten": _flatten,
    "GELU": _gelu,
    "Identity": _nothing,
    "LeakyReLU": lambda module: Activation("leaky_relu", float(module.negative_slope)),
    "Linear": lambda module: Linear(_array(module.weight), _optional(module.bias)),
    "MaxPool": _max_pool,
    "ReLU": lambda _: Activation("relu"),
    "SiLU": lambda _: Activation("silu"),
    "Sigmoid": lambda _: Activation("sigmoid"),
    "Tanh": lambda _: Activation("tanh"),
}
"""By a module's name without its number of axes."""
