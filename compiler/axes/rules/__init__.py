"""One axis rule per operator, one file per family.

A rule says how the axes of an operator's outputs are made from those of its inputs. The law every rule obeys, and the property
tests check, is *deletion commutes*: ``op(delete(x)) == delete(op(x))``, where for contractions and reductions deleted
positions are the ones left out of the sum. An operator wrongly listed as transparent is the only way pruning can be *wrong*;
an operator not listed merely freezes what it touches.
"""

from __future__ import annotations

import torch

from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules import (
    attention,
    constants,
    contraction,
    convolution,
    indexing,
    pointwise,
    quantization,
    raised,
    reduction,
    shape,
    spatial,
)
from compile_sparse.compiler.axes.rules.registry import Labels, rule_for

__all__ = ["labels_of"]

_FAMILIES = (
    attention,
    constants,
    contraction,
    convolution,
    indexing,
    pointwise,
    quantization,
    raised,
    reduction,
    shape,
    spatial,
)


def labels_of(step: RuleContext) -> Labels | None:
    """Labels of the node's outputs, or None when no rule covers it."""
    target = step.node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    # Other libraries' operators are looked up by their full name: another 'mul' may mean something else.
    found = rule_for(step.name if target.namespace == "aten" else target._schema.name)
    if found is not None:
        return found(step)
    return pointwise.labels(step)
