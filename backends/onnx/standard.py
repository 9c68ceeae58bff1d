"""Importing this module registers every emitter of standard ONNX."""

from compile_sparse.backends.onnx import (
    emit_activations,
    emit_arithmetic,
    emit_attention,
    emit_convolution,
    emit_creation,
    emit_norms,
    emit_pooling,
    emit_reductions,
    emit_shapes,
    emit_sizes,
    linear,
)

__all__ = [
    "emit_activations",
    "emit_arithmetic",
    "emit_attention",
    "emit_convolution",
    "emit_creation",
    "emit_norms",
    "emit_pooling",
    "emit_reductions",
    "emit_shapes",
    "emit_sizes",
    "linear",
]
