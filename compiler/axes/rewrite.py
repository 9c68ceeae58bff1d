"""The one place that changes shapes: passes choose what to keep, this applies it everywhere and proves the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.literals import regenerate
from compile_sparse.compiler.axes.selection import KeepTables, Selection
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.edit import eliminate_dead_code, fake_mode_of
from compile_sparse.compiler.ir.fake_propagation import Shapes, propagate_fake_tensors
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.sizes import Size
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, TensorSource

__all__ = ["apply_selection", "rewrite"]


def rewrite(program: Program, analysis: Analysis, keep: KeepTables) -> Program:
    """Delete positions of axes from every weight, literal and cache input they reach.

    Weights are wrapped, not read: the index selects run when a tensor is loaded. Every node is then run on fake tensors and
    must have the shape its label predicts.

    Args:
        program: the program ``analysis`` was made from.
        analysis: labels and frozen axes.
        keep: leaf or anchor -> bool table over its positions, or ``(outer, table[outer, inner])``.

    Returns:
        The new program; ``program`` is untouched.

    Raises:
        ModelError: CS2104 a frozen axis is named, CS2106 a table does not fit, CS2107 fewer positions than a top-k needs,
            CS2108 a tensor already carries a sparsity mask.
        CompileSparseError: CS2190, an internal inconsistency, naming the node.
    """
    if analysis.program is not program:
        raise RuntimeError("the analysis belongs to another program")
    return apply_selection(Selection(analysis, keep))


def apply_selection(selection: Selection) -> Program:
    """See ``rewrite``; for whoever needs the selection afterwards too."""
    analysis, program = selection.analysis, selection.analysis.program
    edited = program.clone()
    sources = _sliced_sources(program, selection)
    mode = fake_mode_of(edited)
    expected: dict[str, Shapes] = {}
    for node in edited.graph.nodes:
        label = analysis.labels.get(node.name)
        if label is None:
            continue
        expected[node.name] = (
            tuple(selection.shape(part) for part in label) if isinstance(label, tuple) else selection.shape(label)
        )
        if node.op == "placeholder" and isinstance(label, list) and any(map(selection.touched, label)):
            # Cache inputs too: an old-sized fake would make the proof fail, rightly.
            value = node.meta["val"]
            sizes = _resized(value, selection.shape(label))
            with mode:
                node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
        elif node.op == "call_function":
            regenerate(node, selection)
    edited = eliminate_dead_code(replace(edited, weights=program.weights.updated(sources)))
    return propagate_fake_tensors(edited, expected)


def _resized(value: torch.Tensor, sizes: list[Size]) -> list[Any]:
    """New static sizes; dynamic ones keep their symbol."""
    return [new if isinstance(new, int) else old for new, old in zip(sizes, value.shape, strict=True)]


def _sliced_sources(program: Program, selection: Selection) -> dict[str, TensorSource]:
    out: dict[str, TensorSource] = {}
    for name, binding in program.bindings.items():
        label = selection.analysis.labels[name]
        assert isinstance(label, list)  # placeholders hold one tensor
        indices = selection.indices(label)
        if not indices:
            continue
        if binding.tensor in program.masks:
            raise ModelError(
                "CS2108",
                "A tensor with a sparsity mask cannot be pruned structurally.",
                where=binding.tensor,
                why="Removing positions would break the pattern of its zeros.",
                hint="Put structural passes before masks in the recipe.",
            )
        source = program.weights[binding.tensor]
        shape = tuple(len(indices[dim]) if dim in indices else size for dim, size in enumerate(source.shape))
        if isinstance(source, AbsentTensor):
            out[binding.tensor] = AbsentTensor(shape, source.dtype, source.name)
        else:
            out[binding.tensor] = DerivedTensor(shape, source.dtype, _Gather(source, indices))
    return out


@dataclass(frozen=True)
class _Gather:
    """Index selects over several dimensions of one source, run on load. Smallest result first, to move the least memory."""

    source: TensorSource
    indices: dict[int, torch.Tensor]

    def __call__(self) -> torch.Tensor:
        value = self.source.load()
        for dim in sorted(self.indices, key=lambda d: len(self.indices[d]) / value.shape[d]):
            value = value.index_select(dim, self.indices[dim])
        return value
