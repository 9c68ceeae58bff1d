"""Which value of the network a linear layer is responsible for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.linears import Linear

__all__ = ["Objective", "objective_of"]

_SAME_ELEMENTS = frozenset(
    {"reshape", "view", "clone", "to", "_to_copy", "contiguous", "dropout", "alias", "squeeze", "unsqueeze"}
)


@dataclass(frozen=True)
class Objective:
    """The value that should equal the dense program's.

    Attributes:
        value: the linear's own output, or the residual sum it ends up in.
        others: the other terms of that sum.
    """

    value: fx.Node
    others: tuple[fx.Node, ...] = ()


def objective_of(linear: Linear, order: Mapping[fx.Node, int]) -> Objective:
    """The residual sum ``linear`` feeds, else its own output.

    Matching the sum makes the layer also repair what earlier layers lost: the other terms come from the pruned network. They
    must be known by the time the layer runs, so of two parallel branches only the later one answers for the sum.
    """
    node, found = linear.node, Objective(linear.node)
    while len(node.users) == 1:
        (user,) = node.users
        name = op_name(user)
        if name in _SAME_ELEMENTS and user.all_input_nodes[0] is node:
            node = user
            continue
        if name != "add" or schema_arguments(user).get("alpha", 1) != 1:
            break
        left, right = user.args[0], user.args[1]
        other = right if left is node else left
        if not isinstance(other, fx.Node) or other is node or not _same_shape(other, node):
            break
        if order[other] >= order[linear.node]:
            break
        found = Objective(user, (*found.others, other))
        node = user
    return found


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.shape == y.shape
