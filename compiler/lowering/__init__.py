"""From a program to the program a runtime is given: small steps, declared by a backend as a list and run by the runner.

``raising_steps`` rewrite groups of ATen nodes into the operators of ``compile_sparse.compiler.ir.ops.fused``: what a runtime has
one kernel for. Whatever is not recognised stays as it is, still correct, and gives a ``Diagnostic`` that says why.
``MixedPrecision`` decides the floating-point type of every value.
"""

from compile_sparse.compiler.lowering.attention import AttentionShape
from compile_sparse.compiler.lowering.mixed_precision import MixedPrecision
from compile_sparse.compiler.lowering.pipeline import raising_steps
from compile_sparse.compiler.lowering.steps import lower_in_steps, run_steps

__all__ = ["AttentionShape", "MixedPrecision", "lower_in_steps", "raising_steps", "run_steps"]
