"""Tensors made from sizes: a fill is the same at every position and may shrink; a range may not."""

from __future__ import annotations

from compile_sparse.compiler.axes.algebra import leaf
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.sizes import shape_of

__all__: list[str] = []


@rule("full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty")
def fill(step: RuleContext) -> Labels:
    """One value everywhere: new axes, tied by whoever uses the tensor."""
    for node in step.operands:
        step.domain(node)
    return [leaf(size) for size in shape_of(step.value)]


@rule("arange", "linspace", "eye")
def ramp(step: RuleContext) -> Labels:
    """Values depend on the position."""
    return step.frozen_like(step.value, f"op '{step.name}' depends on positions")


@rule("scalar_tensor")
def scalar(step: RuleContext) -> Labels:
    """No dimensions."""
    return []
