"""One row per operator that multiplies matrices or is our own: what the compiler does *not* have for it, and why.

Whatever a row does not name must exist; a test compares the table with the registries of axis rules and emitters, with
``compiler/ir/gemms.py`` and with the cost model, in both directions. Every operator needs a fake kernel, so that is no fact of a
row. Other ATen operators need no row: without an axis rule they freeze what they touch, without an emitter they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

__all__ = ["OPERATORS", "Fact"]

Fact = Literal["axis rule", "cost", "calibration", "onnxruntime", "tensorrt"]
"""``cost``: its work, or the stored weight read through it, is counted per token. ``calibration``: statistics observe its input.
``onnxruntime``, ``tensorrt``: that ONNX dialect has an emitter."""

_ELEMENTWISE = "It works element by element, which is little beside the GEMMs."
_NO_WEIGHT = "It has no weight that text could inform."
_ACTIVATIONS_ONLY = "It multiplies activations with each other, whose work grows with the text and is nobody's weights."
_NOT_A_LAYER = "Statistics are gathered for linear layers: weights that are one matrix."
_EQUATION = "Its factors' places depend on an equation."
_NO_EMITTER = "No model that was exported has it: it is refused by name."
_RARE = "No supported model has it; what it touches is left as it is."
_REFUSED_SCHEME = "No target of this runtime accepts a scheme that makes it."
_EXPERTS = "Neither ONNX nor the runtime has a grouped GEMM."

_CONVOLUTION: Mapping[Fact, str] = {"calibration": _NOT_A_LAYER}
_VECTOR: Mapping[Fact, str] = {
    "axis rule": _RARE,
    "cost": "A factor may be a vector or a third operand; stored ones are reported as uncounted.",
    "calibration": _NOT_A_LAYER,
    "onnxruntime": _NO_EMITTER,
    "tensorrt": _NO_EMITTER,
}
_NORM: Mapping[Fact, str] = {"cost": _ELEMENTWISE, "calibration": _NO_WEIGHT}

OPERATORS: Mapping[str, Mapping[Fact, str]] = {
    "aten::linear": {},
    "aten::addmm": {},
    "aten::mm": {},
    "aten::matmul": {},
    "aten::bmm": {"calibration": _NOT_A_LAYER},
    "aten::baddbmm": {"calibration": _NOT_A_LAYER, "onnxruntime": _NO_EMITTER, "tensorrt": _NO_EMITTER},
    "aten::einsum": {"cost": _EQUATION, "calibration": _EQUATION},
    "aten::_grouped_mm": {"calibration": _NOT_A_LAYER, "onnxruntime": _EXPERTS, "tensorrt": _EXPERTS},
    "transformers::grouped_mm_fallback": {"calibration": _NOT_A_LAYER, "onnxruntime": _EXPERTS, "tensorrt": _EXPERTS},
    "aten::conv1d": _CONVOLUTION,
    "aten::conv2d": _CONVOLUTION,
    "aten::conv3d": _CONVOLUTION,
    "aten::convolution": _CONVOLUTION,
    "aten::conv_transpose1d": _CONVOLUTION,
    "aten::conv_transpose2d": _CONVOLUTION,
    "aten::conv_transpose3d": _CONVOLUTION,
    "aten::mv": _VECTOR,
    "aten::addmv": _VECTOR,
    "aten::addbmm": _VECTOR,
    "aten::bilinear": _VECTOR,
    "aten::scaled_dot_product_attention": {"cost": _ACTIVATIONS_ONLY, "calibration": _NO_WEIGHT},
    "compile_sparse::cached_attention": {"cost": _ACTIVATIONS_ONLY, "calibration": _NO_WEIGHT},
    "compile_sparse::rms_norm": _NORM,
    "compile_sparse::residual_rms_norm": _NORM,
    "compile_sparse::dequantize_weight": {"calibration": _NO_WEIGHT},
    "compile_sparse::dequantize_block": {"calibration": _NO_WEIGHT, "onnxruntime": _REFUSED_SCHEME},
    "compile_sparse::dequantize_nvfp4": {"calibration": _NO_WEIGHT, "onnxruntime": _REFUSED_SCHEME},
    "compile_sparse::fake_quantize": {
        "cost": _ELEMENTWISE,
        "calibration": "Its range is what statistics of a layer's input find; the node is put there afterwards.",
    },
}
