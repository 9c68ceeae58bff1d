"""From graph records to ``model.onnx``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from compile_sparse.backends.onnxruntime.graph_writer import MICROSOFT, GraphWriter, TensorRecord

__all__ = ["write_model"]

# Opset 23 is the first with Attention; IR 11 is what it was released with.
_OPSET = 23
_IR_VERSION = 11


def write_model(graph: GraphWriter, path: Path, data_file: str) -> str:
    """Write ``path``, whose large tensors are in ``data_file`` next to it; returns the SHA-256 of what was written."""
    import onnx

    made = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                node.op, node.inputs, node.outputs, name=f"{node.op}_{index}", domain=node.domain, **node.attributes
            )
            for index, node in enumerate(graph.nodes)
        ],
        "compile_sparse",
        [onnx.helper.make_tensor_value_info(v.name, v.element, list(v.shape)) for v in graph.inputs],
        [onnx.helper.make_tensor_value_info(v.name, v.element, list(v.shape)) for v in graph.outputs],
        [_tensor(record, data_file) for record in graph.tensors.values()],
    )
    opsets = [onnx.helper.make_opsetid("", _OPSET), onnx.helper.make_opsetid(MICROSOFT, 1)]
    model = onnx.helper.make_model(made, opset_imports=opsets, producer_name="compile-sparse")
    model.ir_version = _IR_VERSION
    raw = model.SerializeToString()
    path.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def _tensor(record: TensorRecord, data_file: str) -> Any:
    import onnx

    tensor = onnx.TensorProto(name=record.name, data_type=record.element, dims=record.shape)
    if record.extent is None:
        tensor.raw_data = record.inline or b""
        return tensor
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", data_file), ("offset", record.extent[0]), ("length", record.extent[1])):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
