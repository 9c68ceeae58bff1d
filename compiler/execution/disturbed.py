"""A program run in another arithmetic: what rounding alone does to its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.program import Program

__all__ = ["DisturbedExecutor"]

_EXACT_INPUTS = ("position_ids", "attention_mask", "token_type_ids")
"""What is computed from these (angles, masks) runtimes keep in float32 or integers."""
_MOVES = frozenset(
    {
        *(
            "view",
            "_unsafe_view",
            "reshape",
            "expand",
            "permute",
            "transpose",
            "t",
            "slice",
            "select",
            "narrow",
            "split",
        ),
        *("split_with_sizes", "chunk", "unbind", "cat", "stack", "clone", "contiguous", "alias", "detach", "squeeze"),
        *("unsqueeze", "flatten", "unflatten", "repeat", "index_select", "gather", "getitem"),
    }
)
"""Operators that copy values: copies are not rounded."""
_LARGEST = 1e30
"""Beyond are masks: -3.4e38 must not become infinite."""


class DisturbedExecutor(Executor):
    """Every value that depends on data is off by a random share of itself, as in an arithmetic with another order and rounding.

    Args:
        program: what to run.
        relative: largest relative error of a value; the unit roundoff of the arithmetic that is imitated.
        seed: of the errors.
    """

    def __init__(self, program: Program, *, relative: float, seed: int, cache_bytes: int = 1 << 30) -> None:
        super().__init__(program, cache_bytes=cache_bytes)
        self._relative = relative
        self._draws = torch.Generator().manual_seed(seed)
        self._rounded = _from_data(program)

    def _evaluate(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        value = super()._evaluate(node, value_of)
        if node not in self._rounded or op_name(node) in _MOVES:
            return value
        return pytree.tree_map_only(torch.Tensor, self._disturb, value)

    def _disturb(self, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point() or not value.numel():
            return value
        share = torch.rand(value.shape, generator=self._draws, dtype=torch.float32).mul_(2).sub_(1).mul_(self._relative)
        return torch.where(value.abs() < _LARGEST, value + value * share.to(value.dtype), value)


def _from_data(program: Program) -> set[fx.Node]:
    """Calls that depend on values of inputs which hold data, not on their sizes alone."""
    exact = {item.placeholder for item in program.inputs if item.role in _EXACT_INPUTS}
    data = {item.placeholder for item in program.inputs} - exact
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in data:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            sizes = isinstance(node.meta.get("val"), (int, torch.SymInt, torch.SymFloat, torch.SymBool))
            if not sizes:
                found.add(node)
    return found
