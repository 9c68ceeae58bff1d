"""Where groups are contracted, and how strongly those inputs are driven on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from compile_sparse.compiler.axes.algebra import Axis, find
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.analysis_state import AxisUse
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Observer
from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.gemms import gemm_of
from compile_sparse.compiler.ir.nodes import fake_tensor, node_argument
from compile_sparse.compiler.progress import Progress
from compile_sparse.passes.criteria.positions import axis_of
from compile_sparse.passes.statistics.observation import observe_values

__all__ = ["InputPower", "contacts_of", "contracted_dim", "input_power"]


@dataclass
class InputPower:
    """Second moments of one dimension of one value.

    Attributes:
        axis: label of the dimension, of ``n`` positions.
        squares: sum over rows of ``x^2``, ``[n]`` float64.
        rows: how many rows (tokens, for a transformer) there were.
    """

    axis: Axis
    squares: torch.Tensor
    rows: int = 0

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square over rows, ``[n]``."""
        return (self.squares / max(self.rows, 1)).sqrt()


def contacts_of(groups: Sequence[Group], criterion: str) -> list[AxisUse]:
    """Every place where a group is contracted against a weight, once, in graph order of the groups.

    Raises:
        UsageError: CS1126 when nothing contracts some group: then ``criterion`` cannot rank its positions.
    """
    for group in groups:
        if not group.consumers:
            raise UsageError(
                "CS1126",
                f"The criterion {criterion!r} cannot rank {group.kind}.",
                where=str(group.anchor),
                why="It looks at the inputs of the weights that contract an axis, and no weight contracts this one.",
                hint="Use magnitude, taylor or fisher.",
            )
    return list(dict.fromkeys(contact for group in groups for contact in group.consumers))


def input_power(
    analysis: Analysis, contacts: Sequence[AxisUse], calibration: CalibrationStream, progress: Progress, what: str
) -> dict[tuple[str, int], InputPower]:
    """Second moments of the contracted dimensions, by ``(operand node, dimension)``; one run over the text.

    A node that feeds several consumers is observed once. Batches carry no padding, so every token counts.
    """
    found: dict[tuple[str, int], InputPower] = {}
    for contact in contacts:
        axis = axis_of(analysis, contact.operand, contact.dim)
        squares = torch.zeros(int(find(axis).size), dtype=torch.float64)
        found.setdefault((contact.operand, contact.dim), InputPower(axis, squares))
    observers = {node: _observer(node, found) for node, _ in found}
    observe_values(analysis.program, observers, calibration, progress, what)
    return found


def _observer(node: str, found: dict[tuple[str, int], InputPower]) -> Observer:
    watched = [(dim, power) for (owner, dim), power in found.items() if owner == node]

    def observe(value: torch.Tensor) -> None:
        for dim, power in watched:
            others = [other for other in range(value.ndim) if other != dim]
            norms = torch.linalg.vector_norm(value, dim=others, dtype=torch.float64) if others else value.double()
            power.squares += norms.square()
            power.rows += value.numel() // value.shape[dim]

    return observe


def contracted_dim(analysis: Analysis, contact: AxisUse) -> int:
    """Dimension of the stored weight that ``contact`` contracts: 1 for ``linear`` ``[N, K]``, 0 for ``addmm`` ``[K, N]``.

    The labels say it, except for a square weight between two sides of one axis (``x + W x``); there the operator does, through
    any transposes between the stored tensor and the GEMM.
    """
    program = analysis.program
    axis = find(axis_of(analysis, contact.operand, contact.dim))
    placeholder = next(name for name, binding in program.bindings.items() if binding.tensor == contact.weight)
    dims = range(len(analysis.labels[placeholder]))
    same = [dim for dim in dims if find(axis_of(analysis, placeholder, dim)) is axis]
    if len(same) == 1:
        return same[0]
    dim = _by_operator(program.node(contact.node), contact)
    if dim not in same:
        raise ModelError(
            "CS2110",
            f"It is not clear which dimension of {contact.weight!r} is contracted.",
            where=contact.node,
            why=f"Its sides share one axis and {contact.weight!r} is rearranged before the GEMM.",
            hint="Use magnitude, taylor or fisher.",
        )
    return dim


def _by_operator(node: fx.Node, contact: AxisUse) -> int:
    """The contracted dimension as the operator's form and the transposes before it say."""
    gemm = gemm_of(node)
    if gemm is None:  # an equation says it, or nothing does
        return -1
    if contact.operand == gemm.weight.name:  # the stored tensor is on the left
        weight, dim = gemm.input, fake_tensor(gemm.input).ndim - 1
    else:
        weight, dim = gemm.weight, gemm.axis
    while weight.op == "call_function":
        dim = _order(weight)[dim]
        weight = node_argument(weight)
    return dim


def _order(node: fx.Node) -> list[int]:
    """Dimension of the result -> dimension of the argument, for operators that transpose; the same for others."""
    order = list(range(fake_tensor(node).ndim))
    if op_name(node) == "t":
        order.reverse()
    elif op_name(node) == "transpose":
        first, second = schema_arguments(node)["dim0"], schema_arguments(node)["dim1"]
        order[first], order[second] = order[second], order[first]
    elif op_name(node) == "permute":
        order = [place % len(order) for place in schema_arguments(node)["dims"]]
    return order
