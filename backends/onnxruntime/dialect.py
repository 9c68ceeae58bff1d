"""What ONNX Runtime has beyond the standard: its own operators, in a domain of their own."""

from __future__ import annotations

from compile_sparse.backends.onnx.dialect import STANDARD, Dialect

__all__ = ["DIALECT", "MICROSOFT", "emits"]

MICROSOFT = "com.microsoft"
DIALECT = Dialect("onnxruntime", STANDARD.opset, STANDARD.ir_version, STANDARD)
emits = DIALECT.emits
