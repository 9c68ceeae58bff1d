"""The order in which patterns are raised.

Norms come first because a query or key norm sits between the linear and the rotation; attention before residuals because it
only looks at its own operands; residuals last because they consume raised norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import compile_sparse.compiler.ir.ops  # noqa: F401  (registers the raised operators)
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.edit import eliminate_dead_code
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering.attention import AttentionShape, raise_attention
from compile_sparse.compiler.lowering.gelu import raise_gelu_tanh
from compile_sparse.compiler.lowering.residual import raise_residual_norm
from compile_sparse.compiler.lowering.rms_norm import raise_rms_norm

__all__ = ["AttentionShape", "raise_patterns"]


def raise_patterns(
    program: Program, *, refuse_attention: Callable[[AttentionShape], str] | None = None
) -> tuple[Program, list[Diagnostic]]:
    """``program`` with known patterns replaced by one operator each; the input program is untouched.

    Args:
        program: any captured program. Attention is raised in decoders only.
        refuse_attention: a backend's say: a sentence when its kernel cannot run this shape (the attention then stays as it is),
            or an empty string.

    Returns:
        The raised program, equal in value at every valid (not padded) position when padding is on the right and position ids
        continue the cache, and the reasons for what was left alone (codes CS2301 to CS2305).
    """
    raised = program.clone()
    skips = raise_rms_norm(raised)
    raise_gelu_tanh(raised)
    bindings = dict(raised.bindings)
    if program.kind == "decoder":
        tables, attention_skips = raise_attention(raised, bindings, refuse_attention or (lambda shape: ""))
        raised = replace(raised, weights=raised.weights.updated(tables))
        skips += attention_skips
    raise_residual_norm(raised)
    return eliminate_dead_code(raised, bindings=bindings), skips
