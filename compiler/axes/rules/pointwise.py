"""Element by element: every dimension keeps its axis, operands broadcast.

torch tags such operators itself, per overload (``min.other`` is pointwise, ``min.dim`` is not), so there is no table. A few
are pointwise but untagged; random ones are excluded because fewer elements draw other numbers.
"""

from __future__ import annotations

import torch

from compile_sparse.compiler.axes.algebra import find, segment
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.sizes import shape_of

__all__ = ["labels"]

_UNTAGGED = {"__and__", "__or__", "__xor__", "floor_divide", "masked_fill", "bitwise_and", "bitwise_or"}
_UNTAGGED |= {"hardswish", "log_sigmoid"}
_SEVERAL_OUTPUTS = {"frexp"}


def labels(step: RuleContext) -> Labels | None:
    """The broadcast of all tensor operands, for an operator torch tags as pointwise."""
    target = step.node.target
    assert isinstance(target, torch._ops.OpOverload)  # the dispatcher checks
    tagged = torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags
    if not (tagged or step.name in _UNTAGGED) or step.name in _SEVERAL_OUTPUTS:
        return None
    if not step.operands or target._schema.is_mutable:
        return None
    return step.broadcast([step.label(operand) for operand in step.operands], shape_of(step.value))


@rule("where")
def where(step: RuleContext) -> Labels | None:
    """``where(condition, a, b)``; the one-argument form returns positions."""
    if "self" not in step.arguments or "other" not in step.arguments:
        return None
    return step.broadcast([step.label(operand) for operand in step.operands], shape_of(step.value))


@rule("prelu")
def prelu(step: RuleContext) -> Labels:
    """``x`` where positive, else ``x`` times one slope, or one per channel (dimension 1)."""
    out, slope = step.label("self"), step.label("weight")
    if slope and find(slope[0]).size != 1:
        step.tie(slope[0], out[1 if len(out) > 1 else 0])
    return out


@rule("glu")
def glu(step: RuleContext) -> Labels | None:
    """``first half * sigmoid(second half)`` along ``dim``: the halves are one axis twice."""
    out = step.label(step.first)
    dim = step.arguments["dim"] % len(out)
    size = find(out[dim]).size
    if not isinstance(size, int):
        return None
    first, second = segment(out[dim], 0, size // 2), segment(out[dim], size // 2, size)
    out[dim] = step.tie(first, second)
    return out


@rule("clone", "contiguous", "alias", "detach", "_to_copy", "to", "lift_fresh_copy", "type_as")
def copy(step: RuleContext) -> Labels | None:
    """Same values, perhaps another dtype or memory layout."""
    step.pass_domain(step.first)
    return step.label(step.first)


@rule("dropout", "native_dropout")
def dropout(step: RuleContext) -> Labels | None:
    """Identity in evaluation; random in training, which is not labelled."""
    if step.name == "native_dropout" or step.arguments.get("train", True):
        return None
    return step.label(step.first)


@rule("zeros_like", "ones_like", "empty_like", "full_like")
def filled_like(step: RuleContext) -> Labels:
    """Constants of an operand's shape; the operand's values are not read."""
    step.domain(step.first)
    return step.label(step.first)
