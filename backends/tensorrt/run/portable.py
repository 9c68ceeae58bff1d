"""The emitted graph as ONNX Runtime can run it on a processor. Nothing of what it computes is changed, but for two things that it
cannot do:

- attributes that only TensorRT knows are taken off;
- bfloat16, for which it has no kernels, becomes float32: the same weights, without the rounding between operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from compile_sparse.backends.tensorrt.graph.dialect import NVIDIA
from compile_sparse.backends.tensorrt.sparsity.constant_zeros import Constant

__all__ = ["Portable", "portable_model", "reference_refusal"]

_VENDOR_ATTRIBUTE = "TRT_"
_BFLOAT16, _FLOAT = 16, 1
_TYPE_ATTRIBUTES = ("to", "output_dtype", "dtype")


class Portable:
    """A graph and the weights that were converted.

    Attributes:
        model: the protobuf; other weights stay in their file.
        widened: float32 values of weights that were bfloat16, by name: to be given to the session as external initializers.
    """

    def __init__(self, model: bytes, widened: dict[str, np.ndarray[Any, Any]]) -> None:
        self.model, self.widened = model, widened


def reference_refusal(path: Path) -> str:
    """Why ONNX Runtime cannot run the graph, as a sentence, or an empty string."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    vendor = sorted({node.op_type for node in _nodes(model) if node.domain == NVIDIA})
    if vendor:
        return f"ONNX Runtime cannot stand in for TensorRT here: {', '.join(vendor)} is TensorRT's own operator."
    return ""


def portable_model(path: Path) -> Portable:
    """The model of ``path``. Memory follows the converted weights: twice the file where it is in bfloat16.

    Raises:
        Refusal: CS4502, a weight that is missing, cut short or outside of the folder.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for node in _nodes(model):
        kept = [attribute for attribute in node.attribute if not attribute.name.startswith(_VENDOR_ATTRIBUTE)]
        if len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
        for attribute in kept:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i == _BFLOAT16:
                attribute.i = _FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == _BFLOAT16:
            value.type.tensor_type.elem_type = _FLOAT
    widened = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == _BFLOAT16:
            values = _widened(tensor, path.parent)
            inline = not tensor.external_data
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=_FLOAT, dims=tensor.dims))
            if inline:
                tensor.raw_data = values.tobytes()
            else:
                # A name of a place is needed; the values are handed over in memory.
                tensor.data_location = onnx.TensorProto.EXTERNAL
                tensor.external_data.add(key="location", value="in memory")
                widened[tensor.name] = values
    return Portable(bytes(model.SerializeToString()), widened)


def _widened(tensor: Any, folder: Path) -> np.ndarray[Any, Any]:
    """bfloat16 is the upper half of float32."""
    if tensor.external_data:
        count = prod(tensor.dims)
        file, offset = Constant(tensor, folder).place(2 * count)
        bits = np.fromfile(file, np.uint16, count, offset=offset)
    else:
        bits = np.frombuffer(tensor.raw_data, np.uint16)
    return np.asarray((bits.astype(np.uint32) << 16).view(np.float32).reshape(tuple(tensor.dims)))


def _nodes(model: Any) -> Iterator[Any]:
    """Every node, of functions and of graphs within nodes too."""
    pending = [*model.functions, model.graph]
    while pending:
        for node in pending.pop().node:
            yield node
            for attribute in node.attribute:
                pending.extend([attribute.g] if attribute.HasField("g") else [])
                pending.extend(attribute.graphs)
