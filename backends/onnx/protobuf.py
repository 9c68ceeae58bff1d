"""From graph records to ``model.onnx``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from compile_sparse.backends.onnx.dialect import Dialect
from compile_sparse.backends.onnx.element_types import element_type
from compile_sparse.backends.onnx.graph_writer import GraphWriter, NodeRecord, TensorRecord

__all__ = ["node_name", "write_model"]


def write_model(graph: GraphWriter, path: Path, data_file: str, dialect: Dialect) -> str:
    """Write ``path``, whose large tensors are in ``data_file`` next to it; returns the SHA-256 of what was written.

    A node is called after the module it came from, so that a runtime's message about it can be understood.
    """
    import onnx

    made = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                node.op, node.inputs, node.outputs, name=node_name(node, index), domain=node.domain, **node.attributes
            )
            for index, node in enumerate(graph.nodes)
        ],
        "compile_sparse",
        [onnx.helper.make_tensor_value_info(v.name, element_type(v.kind), list(v.shape)) for v in graph.inputs],
        [onnx.helper.make_tensor_value_info(v.name, element_type(v.kind), list(v.shape)) for v in graph.outputs],
        [_tensor(record, data_file) for record in graph.tensors.values()],
    )
    domains = sorted({node.domain for node in graph.nodes} - {""})
    opsets = [onnx.helper.make_opsetid("", dialect.opset), *(onnx.helper.make_opsetid(domain, 1) for domain in domains)]
    model = onnx.helper.make_model(made, opset_imports=opsets, producer_name="compile-sparse")
    model.ir_version = dialect.ir_version
    raw = model.SerializeToString()
    path.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def node_name(node: NodeRecord, index: int) -> str:
    """``model.layers.0.mlp.gate_proj/MatMul_12``; without a known module ``/MatMul_12``."""
    return f"{node.source}/{node.op}_{index}"


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
