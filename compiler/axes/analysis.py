"""Label every dimension of every value of a program, and collect the groups that can be removed together.

One walk over the nodes, linear in their number; no module names, no model types. After each rule the sizes of the labels must
equal the fake tensor's shape, else the rule's answer is thrown away for that node and everything it touches is frozen: doubt
removes an option, it never changes a number.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.axes.algebra import Axis, Conflict, find, is_dynamic, leaf, leaves
from compile_sparse.compiler.axes.analysis_state import AnalysisState, Freeze, Label
from compile_sparse.compiler.axes.groups import Anchor, Group, build_groups, leaf_at
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules import labels_of
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.sizes import same_size, shape_of
from compile_sparse.compiler.targets.target import Target

__all__ = ["CACHE_ROLES", "Analysis", "analyse", "changeable_roles"]

CACHE_ROLES = frozenset({"past_key", "past_value", "present_key", "present_value"})
"""Inputs and outputs whose shapes are the runtime's business, not the caller's."""


def changeable_roles(target: Target) -> frozenset[str]:
    """Roles of inputs and outputs whose shapes ``target`` lets passes change."""
    return CACHE_ROLES if target.cache_may_change else frozenset()


@dataclass(frozen=True)
class Analysis:
    """Result of ``analyse``; valid for the program it was made from.

    Attributes:
        program: the analysed program.
        labels: node name -> axes of its dimensions (a tuple of them for several outputs).
        domains: node name -> axis its values are positions of.
        groups: every leaf that meets a weight, in order of first weight.
        frozen: leaf -> causes, first one first.
        unknown: operator name -> number of nodes without a rule.
        conflicts: sentences about rules that were discarded or ties that failed, for debugging.
    """

    program: Program
    labels: Mapping[str, Label | tuple[Label, ...]]
    domains: Mapping[str | tuple[str, int], Axis]
    groups: tuple[Group, ...]
    frozen: Mapping[Axis, tuple[Freeze, ...]]
    unknown: Mapping[str, int]
    conflicts: tuple[str, ...]

    def prunable(self, kind: str | None = None) -> list[Group]:
        """Groups that may lose indices, of one kind or of all."""
        return [g for g in self.groups if not g.frozen and g.size > 1 and (kind is None or g.kind == kind)]

    def resolve(self, key: Axis | Anchor) -> Axis:
        """The leaf a keep table names."""
        if isinstance(key, Axis):
            return find(key)
        node = next(name for name, binding in self.program.bindings.items() if binding.tensor == key.tensor)
        label = self.labels[node]
        assert isinstance(label, list)  # placeholders hold one tensor
        return leaf_at(label[key.dim], key.path)

    def carried(self) -> Iterator[tuple[str, Label]]:
        """Every labelled tensor as ``(node name, label)``."""
        for name, label in self.labels.items():
            for one_label in label if isinstance(label, tuple) else (label,):
                yield name, one_label


def analyse(program: Program, *, interface_may_change: frozenset[str] = CACHE_ROLES) -> Analysis:
    """Label the program and build its groups.

    Args:
        program: any program; weights are not read, shapes suffice.
        interface_may_change: roles of inputs and outputs whose static axes may shrink. All others are frozen.
    """
    state = AnalysisState(stored=frozenset(program.bindings))
    inputs = {entry.placeholder: entry for entry in program.inputs}
    by_tensor: dict[str, Label] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if not isinstance(value, torch.Tensor):
                continue
            label = [leaf(size) for size in shape_of(value)]
            state.labels[node.name] = label
            tensor = program.tensor_of(node)
            if tensor is not None:
                _tie_same_tensor(state, node, label, by_tensor.setdefault(tensor, label))
            elif node.name not in inputs or inputs[node.name].role not in interface_may_change:
                name = inputs[node.name].name if node.name in inputs else node.name
                _freeze_all(state, [label], f"model input '{name}' has a fixed shape", node)
        elif node.op == "get_attr" and isinstance(value, torch.Tensor):
            state.labels[node.name] = label = [leaf(size) for size in shape_of(value)]
            _freeze_all(state, [label], "it belongs to a constant kept in the graph", node)
        elif node.op == "call_function":
            _visit(state, node, value)
    _freeze_outputs(state, program, interface_may_change)
    frozen: dict[Axis, dict[Freeze, None]] = {}
    for axis, cause in state.freezes:
        for found in leaves(axis):
            frozen.setdefault(found, {})[cause] = None
    causes = {axis: tuple(found) for axis, found in frozen.items()}
    return Analysis(
        program=program,
        labels=state.labels,
        domains=state.domains,
        groups=build_groups(program, state, causes),
        frozen=causes,
        unknown=state.unknown,
        conflicts=tuple(state.conflicts),
    )


def _visit(state: AnalysisState, node: fx.Node, value: Any) -> None:
    if node.target is operator.getitem:
        _getitem(state, node)
        return
    step = RuleContext(node, state)
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not any(isinstance(item, torch.Tensor) for item in values):
        step.freeze_unread_domains()  # sizes and scalars: nothing to label
        return
    try:
        found = labels_of(step)
        reason = f"op '{step.name}' has no axis rule for this call"
    except Conflict as conflict:
        found, reason = None, f"op '{step.name}' relates dimensions that do not match: {conflict}"
        state.conflicts.append(f"{node.name}: {conflict}")
    if found is not None and not _agrees(found, value):
        found, reason = None, f"the axis rule of op '{step.name}' disagrees with the operator's own shape"
        state.conflicts.append(f"{node.name}: rule disagrees with fake shape")
    step.freeze_unread_domains()
    if found is None:
        state.unknown[step.name] = state.unknown.get(step.name, 0) + 1
        _freeze_all(state, [state.label(operand) for operand in step.operands], reason, node)
        # A failed rule may have named domains; nothing may rely on them.
        keys: list[str | tuple[str, int]] = [node.name, *((node.name, place) for place in range(len(values)))]
        for key in keys:
            axis = state.domains.pop(key, None)
            if axis is not None:
                state.freeze(axis, reason, node)
        fresh = [step.frozen_like(item, reason) if isinstance(item, torch.Tensor) else [] for item in values]
        found = tuple(fresh) if isinstance(value, (tuple, list)) else fresh[0]
    state.labels[node.name] = found


def _getitem(state: AnalysisState, node: fx.Node) -> None:
    source, place = node.args
    assert isinstance(source, fx.Node) and isinstance(place, int)  # the graph's form
    found = state.labels.get(source.name)
    if isinstance(found, tuple) and isinstance(node.meta.get("val"), torch.Tensor):
        state.labels[node.name] = found[place]
        domain = state.domains.get((source.name, place))
        if domain is not None:
            state.domains[node.name] = domain


def _agrees(found: Label | tuple[Label, ...], value: Any) -> bool:
    labels = found if isinstance(found, tuple) else (found,)
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(labels) != len(values):
        return False
    for label, item in zip(labels, values, strict=True):
        if not isinstance(item, torch.Tensor):
            continue
        sizes = shape_of(item)
        if len(label) != len(sizes) or not all(same_size(find(a).size, s) for a, s in zip(label, sizes, strict=True)):
            return False
    return True


def _tie_same_tensor(state: AnalysisState, node: fx.Node, label: Label, first: Label) -> None:
    if first is label:
        return
    step = RuleContext(node, state)
    for mine, theirs in zip(label, first, strict=True):
        step.tie(mine, theirs)


def _freeze_outputs(state: AnalysisState, program: Program, may_change: frozenset[str]) -> None:
    for node, output in zip(program.output_nodes, program.outputs, strict=True):
        if not isinstance(node, fx.Node) or not isinstance(state.labels.get(node.name), list):
            continue
        domain = state.domains.get(node.name)
        if domain is not None:
            state.freeze(domain, f"model output '{output.name}' holds positions along it", node)
        for axis in state.label(node):
            state.roles.append((axis, f"output_{output.role}"))
        if output.role not in may_change:
            _freeze_all(state, [state.label(node)], f"model output '{output.name}' has a fixed shape", node)


def _freeze_all(state: AnalysisState, labels: list[Label], reason: str, node: fx.Node) -> None:
    for label in labels:
        for axis in label:
            if not is_dynamic(axis):
                state.freeze(axis, reason, node)
