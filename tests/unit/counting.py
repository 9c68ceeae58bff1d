"""How often each node of a program runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from compile_sparse.compiler.execution.executor import weight_only
from compile_sparse.compiler.ir.program import Program

__all__ = ["count_calls"]


def count_calls(program: Program) -> Counter[str]:
    """How often each call of ``program`` has run from now on; those that depend on weights alone are not counted.

    The graph is changed, and its operators are no longer known by name: give it a clone, and look for linears before.
    """
    calls: Counter[str] = Counter()
    constant = weight_only(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in constant:
            calls[node.name] = 0
            node.target = _counting(node.target, node.name, calls)
    return calls


def _counting(target: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        calls[name] += 1
        return target(*arguments, **named)

    return call
