"""The order in which patterns are raised.

Norms come first because a query or key norm sits between the linear and the rotation; attention before residuals because it
only looks at its own operands; residuals last because they consume raised norms.
"""

from __future__ import annotations

from collections.abc import Callable

from compile_sparse.compiler.extension.backend_contract import LoweringStep
from compile_sparse.compiler.lowering.attention import AttentionShape, RaiseAttention
from compile_sparse.compiler.lowering.gelu import RaiseGelu
from compile_sparse.compiler.lowering.residual import RaiseResidualNorm
from compile_sparse.compiler.lowering.rms_norm import RaiseRmsNorm

__all__ = ["raising_steps"]


def raising_steps(refuse_attention: Callable[[AttentionShape], str] = lambda shape: "") -> tuple[LoweringStep, ...]:
    """Steps that replace known patterns by one operator each; what they give equals the program in value at every valid (not
    padded) position when padding is on the right and position ids continue the cache.

    Args:
        refuse_attention: a backend's say: a sentence when its kernel cannot run this shape (the attention then stays as it is),
            or an empty string.
    """
    return RaiseRmsNorm(), RaiseGelu(), RaiseAttention(refuse_attention), RaiseResidualNorm()
