"""Rules by operator name: bare for ATen, ``namespace::name`` for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.rule_context import RuleContext

__all__ = ["Labels", "Rule", "rule", "rule_for"]

Labels: TypeAlias = Label | tuple[Label, ...]
"""A list for one tensor, a tuple of lists for several."""

Rule: TypeAlias = Callable[[RuleContext], Labels | None]
"""Labels of the node's output(s), or None when the rule does not cover this call (its axes are then frozen)."""

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operator names. A name has one rule: two would make the order of imports matter."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise RuntimeError(f"operator {name!r} has two axis rules")
            _RULES[name] = function
        return function

    return register


def rule_for(name: str) -> Rule | None:
    """The rule registered for an operator name."""
    return _RULES.get(name)
