"""Networks from ONNX files.

Given a file, `load_onnx` reads its graph node by node (`onnx_nodes.py` says what each becomes) into a draft,
which folds batch normalization and fuses activations, and hands back a `Network`. A node that no layer
computes is refused by its index, type and attribute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.errors import ConvServiceError, InvalidRequest, MissingPackage, Reason
from convservice.imports.draft import Draft, unique_id
from convservice.imports.onnx_node import OnnxNode, Unsupported
from convservice.imports.onnx_nodes import READERS
from convservice.network import Network
from convservice.nodes import INPUT

Array = NDArray[Any]


def load_onnx(path: str | os.PathLike[str]) -> Network:
    """The network that an ONNX file states.

    Its layers compute what the file's nodes do, for any batch: Conv, ConvTranspose, MaxPool, AveragePool,
    GlobalMaxPool, GlobalAveragePool, ReduceMax and ReduceMean over all spatial axes, Relu, LeakyRelu,
    Sigmoid, Tanh, Gelu, Mul of x and Sigmoid(x) (SiLU) or 1 + Erf(x / sqrt 2) (GELU), BatchNormalization,
    Add, Sum, Mul and Div by a constant, Flatten, Reshape and Squeeze to vectors, Gemm, MatMul, Identity and
    Dropout; constants from initializers and Constant nodes.
    The graph has one input; its outputs keep their names, other characters than a name may have as `_`.
    Batch normalization is folded into the convolution before it, in float64 and rounded once.

    Raises:
        MissingPackage: the package onnx is not installed.
        OSError: there is no such file, or it cannot be read.
        InvalidRequest: `INVALID_FILE` for what is no ONNX file; `UNKNOWN_LAYER` for a node that no layer
            computes, naming its index, type and attribute; what layers and networks raise, naming the node.
    """
    try:
        onnx: Any = import_module("onnx")  # not all of it has annotations
    except ImportError as exc:
        raise MissingPackage.of("onnx", "onnx") from exc
    where = Path(path)
    with where.open("rb"):  # so that a file that is not there is an OSError in the usual words
        pass
    try:
        model = onnx.load(os.fspath(where))
    except OSError:
        raise
    except Exception as exc:
        raise InvalidRequest(
            f"{where} is no ONNX file, or is damaged: {exc}",
            reason=Reason.INVALID_FILE,
            metadata={"path": str(where)},
        ) from exc
    try:
        return _Reader(model.graph).network()
    except InvalidRequest as exc:
        raise InvalidRequest(
            f"{where}: {exc.message}",
            reason=exc.reason,
            metadata={**exc.metadata, "path": str(where)},
            field=exc.field,
        ) from exc
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as exc:
        raise _damaged(where, exc) from exc  # damage may put any value into any field


def _damaged(path: Path, exc: Exception) -> InvalidRequest:
    return InvalidRequest(
        f"{path} is no ONNX file, or is damaged: {exc}",
        reason=Reason.INVALID_FILE,
        metadata={"path": str(path)},
    )


class _Reader:
    """A graph on its way to a network.

    Attributes:
        constants: value name to array.
        steps: value name to the draft's step that gives it.
        draft: the network so far.
    """

    def __init__(self, graph: Any) -> None:
        from onnx.numpy_helper import to_array

        self._graph = graph
        self._to_array: Callable[[Any], Array] = to_array
        self.constants: dict[str, Array] = {one.name: to_array(one) for one in graph.initializer}
        inputs = [value for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1:
            names = ", ".join(repr(value.name) for value in inputs) or "none"
            raise InvalidRequest(
                f"a network has one input, this graph has {len(inputs)}: {names}",
                reason=Reason.INVALID_NETWORK,
            )
        self.steps: dict[str, str] = {inputs[0].name: INPUT}
        self.draft = Draft(self._rank(inputs[0]))

    def network(self) -> Network:
        """Reads every node."""
        for index, proto in enumerate(self._graph.node):
            self._read(OnnxNode(proto, index, self.constants, self.steps))
        outputs: dict[str, str] = {}
        for value in self._graph.output:
            if value.name not in self.steps:
                raise InvalidRequest(
                    f"output {value.name!r} does not depend on the input", reason=Reason.INVALID_NETWORK
                )
            outputs[unique_id(value.name, outputs)] = self.steps[value.name]
        return self.draft.network(outputs)

    def _read(self, node: OnnxNode) -> None:
        try:
            if node.kind == "Constant" and not node.custom:
                self.constants[node.outputs[0]] = self._constant(node)
                return
            read = None if node.custom else READERS.get(node.kind)
            if read is None:
                raise Unsupported(f"no layer computes {node.kind}; known are {', '.join(READERS)}")
            step = read(node, self.draft)
            node.end()
        except Unsupported as exc:
            raise InvalidRequest(
                f"{node.where}: {exc}", reason=Reason.UNKNOWN_LAYER, metadata={"op_type": node.kind}
            ) from exc
        except ConvServiceError as exc:
            raise InvalidRequest(
                f"{node.where}: {exc.message}", reason=exc.reason, metadata=exc.metadata, field=exc.field
            ) from exc
        self.steps[node.outputs[0]] = step
        for extra in (name for name in node.outputs[1:] if name):
            self._refuse_use(extra, node)

    def _refuse_use(self, value: str, node: OnnxNode) -> None:
        """Refuses a second output, such as a pooling's indices, that something reads."""
        readers = [one.name for one in self._graph.output] + [
            n for one in self._graph.node for n in one.input
        ]
        if value in readers:
            raise InvalidRequest(
                f"{node.where}: only its first output is computed here, and {value!r} is used",
                reason=Reason.UNKNOWN_LAYER,
                metadata={"op_type": node.kind},
            )

    def _constant(self, node: OnnxNode) -> Array:
        tensor = node.take("value")
        kinds: Mapping[str, type] = {
            "value_float": np.float32,
            "value_floats": np.float32,
            "value_int": np.int64,
            "value_ints": np.int64,
        }
        if tensor is not None:
            return self._to_array(tensor)
        for name, dtype in kinds.items():
            value = node.take(name)
            if value is not None:
                return np.array(value, dtype)
        raise Unsupported("it holds no tensor of numbers")

    def _rank(self, value: Any) -> int | None:
        """Spatial axes of the input: those that it declares, or those of the first filter bank."""
        if value.type.tensor_type.HasField("shape"):
            return max(len(value.type.tensor_type.shape.dim) - 2, 0)
        for node in self._graph.node:
            if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in self.constants:
                return self.constants[node.input[1]].ndim - 2
        return None
