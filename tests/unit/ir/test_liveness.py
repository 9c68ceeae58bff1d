"""When values are dropped: after their last use, and outputs only where nobody asks for them."""

from __future__ import annotations

from torch import fx

from compile_sparse.compiler.ir.liveness import last_uses


def _names(graph: fx.Graph, *, outputs: bool) -> dict[str, list[str]]:
    found = last_uses(graph, outputs=outputs)
    return {node.name: sorted(dead.name for dead in values if dead.op != "output") for node, values in found.items()}


def test_values_die_after_their_last_use() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(abs, (x,))
    graph.call_function(abs, (x,))  # nobody reads it
    graph.output((a,))
    assert _names(graph, outputs=True) == {"abs_2": ["abs_2", "x"], "output": ["abs_1"]}
    assert _names(graph, outputs=False) == {"abs_1": ["abs_1"], "abs_2": ["abs_2", "x"]}
