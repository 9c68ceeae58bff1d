"""Groups: what one axis couples across the whole program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from compile_sparse.compiler.axes.algebra import Axis, find, leaves
from compile_sparse.compiler.axes.analysis_state import AnalysisState, AxisUse, Freeze, origin
from compile_sparse.compiler.ir.program import Program

__all__ = ["Anchor", "Group", "Kind", "build_groups", "format_groups", "leaf_at"]

Kind = Literal["channels", "heads", "width", "head_dim", "experts", "conv", "vocab", "space", "other"]
"""What an axis is called in recipes and reports.

``conv``: channels that a convolution sums over or carries group by group (batch norm, group norm and residual sums follow them);
a stage of ConvNeXt is one, although linears read it too. ``width``: a normalised residual stream that no convolution reads, even
when a patch embedding or a convolution stem makes it. ``channels``: what only linears sum over, such as the inside of an MLP.
``space``: positions of images and kernels, always frozen.
"""


@dataclass(frozen=True)
class Anchor:
    """A name for a leaf that survives across runs: a tensor, one of its dimensions, and the way down its expression."""

    tensor: str
    dim: int
    path: tuple[int, ...] = ()

    def __str__(self) -> str:
        inside = "".join(f".{step}" for step in self.path)
        return f"{self.tensor}[{self.dim}{inside}]"


@dataclass(frozen=True)
class Group:
    """One leaf and everything it touches.

    Attributes:
        leaf: root of the axis, valid within its analysis.
        size: number of positions.
        members: ``(tensor name, dimension)`` whose expression contains the leaf; deleting a position slices them all.
        roles: what the axis does.
        frozen: why it may not change, first cause first; empty when it may.
        producers: where a weight gives a value this axis.
        consumers: where the axis is contracted against a weight.
        anchor: the stable name.
        kind: a word for reports, derived from the roles.
    """

    leaf: Axis
    size: int
    members: tuple[tuple[str, int], ...]
    roles: frozenset[str]
    frozen: tuple[Freeze, ...]
    producers: tuple[AxisUse, ...]
    consumers: tuple[AxisUse, ...]
    anchor: Anchor
    kind: Kind


def build_groups(
    program: Program, state: AnalysisState, frozen: Mapping[Axis, tuple[Freeze, ...]]
) -> tuple[Group, ...]:
    """One group per static leaf that meets a weight, ordered by first weight."""
    nodes = {node.name: node for node in program.graph.nodes}
    members: dict[Axis, dict[tuple[str, int], None]] = {}
    anchors: dict[Axis, Anchor] = {}
    for name, binding in program.bindings.items():
        if name not in nodes or not nodes[name].users:
            continue
        for dim, axis in enumerate(state.label(nodes[name])):
            for found in leaves(axis):
                members.setdefault(found, {})[(binding.tensor, dim)] = None
                anchors.setdefault(found, Anchor(binding.tensor, dim, _path_to(axis, found)))
    roles: dict[Axis, set[str]] = {}
    for axis, role in state.roles:
        for found in leaves(axis):
            roles.setdefault(found, set()).add(role)
    producers = _contacts(program, nodes, state.producers)
    consumers = _contacts(program, nodes, state.consumers)
    groups = []
    for axis, places in members.items():
        if not isinstance(axis.size, int):
            continue
        own = frozenset(roles.get(axis, ()))
        groups.append(
            Group(
                leaf=axis,
                size=axis.size,
                members=tuple(places),
                roles=own,
                frozen=frozen.get(axis, ()),
                producers=tuple(producers.get(axis, ())),
                consumers=tuple(consumers.get(axis, ())),
                anchor=anchors[axis],
                kind=_kind(own),
            )
        )
    return tuple(groups)


def _kind(roles: frozenset[str]) -> Kind:
    """From roles only, most specific first; never from names."""
    if roles & {"topk", "selected"}:
        return "experts"
    if roles & {"vocab", "output_logits"}:
        return "vocab"
    if "space" in roles:
        return "space"
    if "attn_heads" in roles:
        return "heads"
    if roles & {"qk_dim", "v_dim"} and "softmax" not in roles:  # attention normalises over positions
        return "head_dim"
    if roles & {"conv_groups", "conv_in"}:
        return "conv"
    if "batch_matmul" in roles:
        return "heads"
    # A mean alone may be one over positions; a norm written out averages what linears read.
    if roles & {"norm", "embedding"} or roles >= {"reduce_mean", "contract"}:
        return "width"
    if "conv_out" in roles:
        return "conv"
    if "contract" in roles:
        return "channels"
    return "other"


def _contacts(
    program: Program, nodes: Mapping[str, fx.Node], events: Sequence[tuple[Axis, AxisUse]]
) -> dict[Axis, list[AxisUse]]:
    """Contacts whose weight side is a stored tensor, by leaf."""
    out: dict[Axis, list[AxisUse]] = {}
    for axis, contact in events:
        tensor = program.tensor_of(origin(nodes[contact.weight], choices=True))
        if tensor is None or (contact.operand and program.tensor_of(origin(nodes[contact.operand])) is not None):
            continue
        named = AxisUse(contact.node, contact.operand, contact.dim, tensor)
        for found in leaves(axis):
            known = out.setdefault(found, [])
            if named not in known:
                known.append(named)
    return out


def _path_to(axis: Axis, target: Axis) -> tuple[int, ...]:
    root = find(axis)
    if root is target:
        return ()
    for place, child in enumerate(root.children):
        if target in leaves(child):
            return (place, *_path_to(child, target))
    raise KeyError(target)


def leaf_at(axis: Axis, path: tuple[int, ...]) -> Axis:
    """The leaf reached from an axis by child numbers."""
    root = find(axis)
    for place in path:
        root = find(root.children[place])
    return root


def format_groups(groups: Sequence[Group]) -> str:
    """A table for people and golden tests: kind, size, anchor, members, first cause of a freeze."""
    lines = []
    for group in groups:
        state = f"frozen: {group.frozen[0].reason}" if group.frozen else "free"
        lines.append(f"{group.kind:9s} {group.size:4d}  {group.anchor}  {state}")
        lines += [f"{'':16s}{tensor}[{dim}]" for tensor, dim in group.members]
    return "\n".join(lines) + "\n"
