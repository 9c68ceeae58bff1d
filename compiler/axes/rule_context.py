"""``RuleContext``: everything a rule may read and write while it labels one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.axes import algebra
from compile_sparse.compiler.axes.algebra import Axis, Conflict, find, leaf, one
from compile_sparse.compiler.axes.analysis_state import AnalysisState, AxisUse, Label, origin
from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.nodes import node_argument
from compile_sparse.compiler.ir.sizes import is_static, same_size, shape_of

__all__ = ["RuleContext"]


class RuleContext:
    """One node being labelled.

    Attributes:
        node: the graph node.
        name: bare operator name.
        value: fake value(s) of the node.
        arguments: arguments by schema name.
    """

    def __init__(self, node: fx.Node, state: AnalysisState) -> None:
        self.node = node
        self.name = op_name(node)
        self.value: Any = node.meta.get("val")
        self.arguments: dict[str, Any] = schema_arguments(node) if hasattr(node.target, "_schema") else {}
        self._state = state
        self._domains_read: set[str] = set()

    @property
    def operands(self) -> list[fx.Node]:
        """Labelled tensor inputs, each once."""
        return [n for n in self.node.all_input_nodes if isinstance(self._state.labels.get(n.name), list)]

    @property
    def first(self) -> fx.Node:
        """First positional argument, which must be a node."""
        return node_argument(self.node)  # schemas put the tensor first

    def label(self, argument: fx.Node | str) -> Label:
        """A copy of the label of a node, or of the argument of that schema name."""
        node = self.arguments[argument] if isinstance(argument, str) else argument
        return list(self._state.label(node))

    def optional(self, argument: str) -> Label | None:
        """Label of an argument that may be None."""
        return None if self.arguments.get(argument) is None else self.label(argument)

    def is_weight(self, node: fx.Node) -> bool:
        """Whether the node is a stored tensor, or matrices chosen from one."""
        return origin(node, choices=True).name in self._state.stored

    # -- index domains: a tensor whose *values* are positions along an axis

    def domain(self, node: fx.Node) -> Axis | None:
        """Axis the node's values index, or None. Reading it promises to treat the values as positions."""
        self._domains_read.add(node.name)
        return self._state.domains.get(node.name)

    def set_domain(self, axis: Axis, output: int | None = None) -> None:
        """This node's values (or those of one of its outputs) are positions along ``axis``."""
        self._state.domains[self.node.name if output is None else (self.node.name, output)] = axis

    def pass_domain(self, source: fx.Node) -> None:
        """This node's values are those of ``source``, moved or copied."""
        axis = self.domain(source)
        if axis is not None:
            self.set_domain(axis)

    def freeze_unread_domains(self) -> None:
        """Positions used as plain numbers would change meaning when the axis they index is pruned."""
        for operand in self.node.all_input_nodes:
            axis = self._state.domains.get(operand.name)
            if axis is not None and operand.name not in self._domains_read:
                self.freeze(axis, f"op '{self.name}' uses positions along it as numbers")

    # -- events

    def freeze(self, axis: Axis, reason: str) -> None:
        """The axis may not change."""
        self._state.freeze(axis, reason, self.node)

    def frozen(self, size: Any, reason: str) -> Axis:
        """A new axis that may not change."""
        axis = leaf(size)
        if is_static(size):
            self.freeze(axis, reason)
        return axis

    def frozen_like(self, value: torch.Tensor, reason: str) -> Label:
        """A label of new frozen axes."""
        return [self.frozen(size, reason) for size in shape_of(value)]

    def role(self, axis: Axis, role: str) -> None:
        """Something the axis does; decides only how a group is called in reports."""
        self._state.roles.append((axis, role))

    def contract(self, operand: fx.Node, dim: int, weight: fx.Node, axis: Axis) -> None:
        """The node sums over ``axis``, dimension ``dim`` of ``operand``, against ``weight``."""
        self.role(axis, "contract")
        self._state.consumers.append((axis, AxisUse(self.node.name, operand.name, dim, weight.name)))

    def produce(self, weight: fx.Node, axis: Axis) -> None:
        """The node's output has ``axis`` because ``weight`` has."""
        self._state.producers.append((axis, AxisUse(self.node.name, "", -1, weight.name)))

    # -- ties

    def tie(self, a: Axis, b: Axis) -> Axis:
        """The two axes are one. When they cannot be, both freeze."""
        try:
            return algebra.unify(a, b)
        except Conflict as conflict:
            self._state.conflicts.append(f"{self.node.name}: {conflict}")
            for axis in (a, b):
                self.freeze(axis, f"op '{self.name}' relates dimensions that do not match: {conflict}")
            return a

    def broadcast(self, labels: Sequence[Label], sizes: Sequence[Any]) -> Label:
        """Right-aligned broadcast of ``labels`` to ``sizes``. Dimensions of size 1 stretch and tie nothing."""
        out: Label = []
        for offset in range(len(sizes), 0, -1):
            size = sizes[-offset]
            meeting = [label[-offset] for label in labels if len(label) >= offset and find(label[-offset]).size != 1]
            if not meeting:
                out.append(one() if size == 1 else leaf(size))
                continue
            current = meeting[0]
            for other in meeting[1:]:
                # Purely dynamic dimensions with differently written sizes are equal at run time; nothing to couple.
                if algebra.is_dynamic(current) and algebra.is_dynamic(other) and find(current) is not find(other):
                    continue
                current = self.tie(current, other)
            out.append(current if same_size(find(current).size, size) else leaf(size))
        return out
