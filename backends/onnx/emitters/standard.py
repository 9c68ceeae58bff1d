"""Importing this module registers every emitter of standard ONNX."""

from compile_sparse.backends.onnx.emitters import (
    activations,
    arithmetic,
    attention,
    convolution,
    creation,
    gemm,
    norms,
    pooling,
    reductions,
    shapes,
    sizes,
)

__all__ = [
    "activations",
    "arithmetic",
    "attention",
    "convolution",
    "creation",
    "gemm",
    "norms",
    "pooling",
    "reductions",
    "shapes",
    "sizes",
]
