"""When a value of the graph is needed for the last time."""

from __future__ import annotations

from torch import fx

__all__ = ["last_uses"]


def last_uses(graph: fx.Graph, *, outputs: bool = True) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody needs after it: itself, when it has no user.

    Args:
        graph: what is run in its own order.
        outputs: the caller wants the program's outputs, which live to the end.
    """
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output" and not outputs:
            continue
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    dead_after: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last.items():
        dead_after.setdefault(user, []).append(used)
    return dead_after
