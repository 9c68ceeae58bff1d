"""Recognise the rotate-half rotary embedding and turn its angles into tables.

    add(mul(x, cos), mul(cat([-x[..., D/2:], x[..., :D/2]], -1), sin))        x: [B, H, S, D]

The angles are code too (scaling, long-context variants that look at the length). They are evaluated: the table is their value
at positions ``0 .. context - 1`` and the proof is that other lengths, cache sizes and padded batches give rows of that table,
so that the angle depends on the position alone, and that both halves agree. Any attention scaling is inside the tables.
Source: arXiv:2104.09864.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.ir.edit import add_weight, schema_arguments
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.nodes import dimensions, is_op, operand_pairs
from compile_sparse.compiler.ir.program import Binding, Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.lowering.evaluation import Point, evaluate, sample_inputs, valid_queries

__all__ = ["ROTARY_PREFIX", "RotaryTables", "Rotation", "match_rotation"]

ROTARY_PREFIX = "compile_sparse.rotary."
"""Start of the names of table tensors."""

_POINTS = (Point(1, 7, 0), Point(2, 3, 5), Point(1, 1, 9), Point(3, 6, 2, padded=True))


@dataclass(frozen=True)
class Rotation:
    """A matched rotation: what is rotated and the angle nodes (before they are broadcast over heads)."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


def match_rotation(node: Any) -> Rotation | None:
    """The rotation computed by ``node``, or None."""
    if not is_op(node, "aten::add") or schema_arguments(node)["alpha"] != 1:
        return None
    for plain, turned in operand_pairs(node):
        if not (is_op(plain, "aten::mul") and is_op(turned, "aten::mul")):
            continue
        for x, cos in operand_pairs(plain):
            for half, sin in operand_pairs(turned):
                if all(isinstance(n, fx.Node) for n in (x, cos, sin)) and _is_rotated_half(half, x):
                    return Rotation(x, _before_heads(cos), _before_heads(sin))
    return None


class RotaryTables:
    """Proves angles and adds each distinct pair of tables to the program once.

    Attributes:
        sources: what the caller adds to the weight store.
    """

    def __init__(self, program: Program, bindings: dict[str, Binding]) -> None:
        self._program = program
        self._bindings = bindings
        self._answers: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node] | str] = {}
        self.sources: dict[str, ResidentTensor] = {}

    def placeholders(self, rotation: Rotation) -> tuple[fx.Node, fx.Node] | str:
        """Placeholders of the cosine and sine tables ``[context, D / 2]``, or a sentence saying why there are none."""
        key = (rotation.cos, rotation.sin)
        if key not in self._answers:
            self._answers[key] = self._prove_both(rotation)
        return self._answers[key]

    def _prove_both(self, rotation: Rotation) -> tuple[fx.Node, fx.Node] | str:
        tables = []
        for angle in (rotation.cos, rotation.sin):
            try:
                table = self._table(angle)
            except LookupError as error:
                return f"the angles cannot be evaluated: {error.args[0]}"
            if isinstance(table, str):
                return table
            tables.append(table)
        cos, sin = (self._add(name, table) for name, table in zip(("cos", "sin"), tables, strict=True))
        return cos, sin

    def _table(self, angle: fx.Node) -> torch.Tensor | str:
        context = context_length(self._program.config)
        if not context:
            return "the config gives no context length"
        whole = self._rows(angle, Point(1, context, 0))
        if whole is None:
            return "the angles do not have the shape [batch, length, head size]"
        table = whole[0]
        half = table.shape[1] // 2
        if not torch.equal(table[:, :half], table[:, half:]):
            return "the two halves of the angles differ"
        for point in _POINTS:
            if point.past + point.length > context:
                continue
            rows = self._rows(angle, point)
            expected = table[point.past : point.past + point.length]
            if rows is None or not bool(((rows == expected).all(-1) | ~valid_queries(point)).all()):
                return f"the angles depend on more than the position ({point.length} new after {point.past} cached)"
        return table[:, :half].to(torch.float32).contiguous()

    def _rows(self, angle: fx.Node, point: Point) -> torch.Tensor | None:
        """``[B or 1, S, D]``, or None when the angles have another shape."""
        value = evaluate(self._program, angle, sample_inputs(self._program, point))
        if value.dim() == 4 and value.shape[1] == 1:
            value = value[:, 0]
        return value if value.dim() == 3 and value.shape[1] == point.length else None

    def _add(self, name: str, table: torch.Tensor) -> fx.Node:
        tensor = f"{ROTARY_PREFIX}{len(self.sources) // 2}.{name}"
        source = ResidentTensor(table)
        self.sources[tensor] = source
        placeholder = "b_" + tensor.replace(".", "_")
        return add_weight(self._program, self._bindings, placeholder, Binding(tensor, "buffer"), source)


def _before_heads(angle: fx.Node) -> fx.Node:
    """Layers broadcast the same angles over heads with an unsqueeze each; the node before it is shared."""
    return angle.args[0] if is_op(angle, "aten::unsqueeze") and angle.args[1] in (1, -3) else angle  # type: ignore[return-value]


def _is_rotated_half(node: Any, x: fx.Node) -> bool:
    if not is_op(node, "aten::cat") or schema_arguments(node)["dim"] not in (-1, len(dimensions(x)) - 1):
        return False
    parts = node.args[0]
    width = dimensions(x)[-1]
    if len(parts) != 2 or not is_op(parts[0], "aten::neg") or not isinstance(width, int) or width % 2:
        return False
    half = width // 2
    return _is_slice(parts[0].args[0], x, half, width) and _is_slice(parts[1], x, 0, half)


def _is_slice(node: Any, x: fx.Node, start: int, end: int) -> bool:
    if not is_op(node, "aten::slice"):
        return False
    given = schema_arguments(node)
    last = len(dimensions(x)) - 1
    if given["self"] is not x or given["dim"] not in (-1, last) or given["step"] != 1:
        return False
    stop = given["end"] if given["end"] is not None else end
    return (given["start"] or 0) == start and (
        stop == end or (isinstance(stop, int) and stop > end == dimensions(x)[-1])
    )
