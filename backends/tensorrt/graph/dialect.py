"""ONNX as TensorRT reads it: opset 24 (TensorScatter), strongly typed, without operators of other vendors."""

from __future__ import annotations

from compile_sparse.backends.onnx.dialect import STANDARD, Dialect

__all__ = ["DECOMPOSABLE", "DIALECT", "NVIDIA", "emits"]

NVIDIA = "trt"
"""Domain of TensorRT's own operators."""
DECOMPOSABLE = "TRT_decomposable"
"""Attribute of Attention: it may be built without a dedicated kernel. Other runtimes refuse it; ours takes it off."""
# Opset 24 is the first with TensorScatter; IR 12 is what it was released with.
DIALECT = Dialect("tensorrt", opset=24, ir_version=12, parent=STANDARD)
emits = DIALECT.emits
