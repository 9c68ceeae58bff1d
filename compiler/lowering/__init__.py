"""Recognise what a runtime has one kernel for.

``raise_patterns`` rewrites groups of ATen nodes into the operators of ``compile_sparse.compiler.ir.ops.fused``. Whatever is not
recognised stays as it is, still correct, and gives a ``Diagnostic`` that says why.
"""

from compile_sparse.compiler.lowering.pipeline import AttentionShape, raise_patterns

__all__ = ["AttentionShape", "raise_patterns"]
