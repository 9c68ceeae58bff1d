"""What analysis writes down while it walks the graph.

Axes keep being refined until the last node, so freezes, roles and contractions are *events* about an axis; they are resolved
to leaves once, at the end. Order of refinement then does not matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import fx

from compile_sparse.compiler.axes.algebra import Axis
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.nodes import node_argument
from compile_sparse.compiler.ir.ops.quantization import WEIGHT_DEQUANTIZERS

__all__ = ["AnalysisState", "AxisUse", "Freeze", "Label", "origin", "source_line"]

Label = list[Axis]
"""One axis per dimension of a tensor."""

_SAME_VALUES = {"alias", "_to_copy", "to", "clone", "contiguous", "detach"} | WEIGHT_DEQUANTIZERS
_MOVES = frozenset(_SAME_VALUES | {"transpose", "t", "permute", "unsqueeze", "squeeze", "expand"})
_CHOICES = frozenset({"index", "index_select"})
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclass(frozen=True)
class Freeze:
    """Why an axis may not change.

    Attributes:
        reason: a clause such as "op 'flip' depends on positions".
        node: graph node that caused it.
        source: ``file:line in function`` of the model's code, or empty.
    """

    reason: str
    node: str
    source: str = ""

    def __str__(self) -> str:
        place = f"{self.node}, {self.source}" if self.source else self.node
        return f"{self.reason} ({place})"


@dataclass(frozen=True)
class AxisUse:
    """A node that contracts an axis (or produces it from a weight).

    Attributes:
        node: the contracting node.
        operand: node holding the activations; its dimension ``dim`` is contracted. Empty for a producer.
        dim: see ``operand``.
        weight: node of the weight side.
    """

    node: str
    operand: str
    dim: int
    weight: str


@dataclass
class AnalysisState:
    """Labels, index domains and deferred events of one analysis.

    ``stored`` names the placeholders of stored tensors.
    """

    stored: frozenset[str] = frozenset()
    labels: dict[str, Label | tuple[Label, ...]] = field(default_factory=dict)
    domains: dict[str | tuple[str, int], Axis] = field(default_factory=dict)
    freezes: list[tuple[Axis, Freeze]] = field(default_factory=list)
    roles: list[tuple[Axis, str]] = field(default_factory=list)
    consumers: list[tuple[Axis, AxisUse]] = field(default_factory=list)
    producers: list[tuple[Axis, AxisUse]] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)

    def label(self, node: fx.Node) -> Label:
        """Label of a tensor-valued node."""
        found = self.labels[node.name]
        assert isinstance(found, list)  # several-valued nodes are read through getitem only
        return found

    def freeze(self, axis: Axis, reason: str, node: fx.Node) -> None:
        """The axis may not change."""
        self.freezes.append((axis, Freeze(reason, node.name, source_line(node))))


def origin(node: fx.Node, *, choices: bool = False) -> fx.Node:
    """The node that a value was read from, through moves and casts.

    With ``choices``, also through indexing: one matrix of several, as experts are chosen.
    """
    passing = _MOVES | _CHOICES if choices else _MOVES
    while node.op == "call_function" and op_name(node) in passing:
        node = node_argument(node)
    return node


def source_line(node: fx.Node) -> str:
    """The model's innermost line in the node's recorded stack, as ``file:line in function``.

    The folder is left out: it differs by machine.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    # torch's own frames (nn.functional and the like) say less than the model's line that called them.
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    path, line, function = own[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line} in {function}"
