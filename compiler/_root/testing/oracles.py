"""Independent answers to "what should the pruned program compute?".

Shape checks cannot prove a coupling: merging heads and copies in the wrong order fits everywhere and is wrong. Two oracles run
the *dense* graph instead:

* **Z**: every coupled weight slice is zeroed, nothing else changes. Exact when the axis meets only contractions, pointwise
  operators, concatenation and attention batches.
* **M**: removed positions of every value are held at zero, and operators that normalise or reduce see kept positions only.
  Right for every axis.

Tolerance: deleting zeros reorders sums of length K, which costs a relative error of about ``u sqrt(K)`` per contraction
(probabilistic rounding bound, Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019); errors of the graph's contractions add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.axes.algebra import factors, find, regroup
from compile_sparse.compiler.axes.analysis import Analysis
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.selection import KeepTables, Selection
from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.gemms import gemm_of
from compile_sparse.compiler.ir.nodes import is_op, operator_of
from compile_sparse.compiler.ir.ops.quantization import WEIGHT_DEQUANTIZERS
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.sizes import shape_of, total

__all__ = ["OracleReport", "compare", "interpret", "masked_outputs", "relative_error", "tolerance", "zeroed_outputs"]

_SAFETY = 8.0
_NORMALISING = frozenset({"norm", "softmax", "topk", "scan"})


@dataclass(frozen=True)
class OracleReport:
    """Largest relative errors of the pruned program's outputs.

    Attributes:
        zero: against oracle Z; None when the axes meet a normalisation, where Z is not an oracle.
        masked: against oracle M; None for keep tables that depend on an outer axis, which M cannot express.
        tolerance: derived bound both must stay under.
    """

    zero: float | None
    masked: float | None
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether every applicable oracle agrees; at least one must apply."""
        errors = [error for error in (self.zero, self.masked) if error is not None]
        return bool(errors) and all(error <= self.tolerance for error in errors)


def compare(pruned: Program, analysis: Analysis, keep: KeepTables, inputs: Mapping[str, torch.Tensor]) -> OracleReport:
    """Run the pruned program and both oracles on dense ``inputs`` (by public name); cache inputs are sliced as predicted."""
    dense, selection = analysis.program, Selection(analysis, keep)
    small = {
        entry.name: selection.gather(inputs[entry.name], _label(analysis, entry.placeholder)) for entry in dense.inputs
    }
    actual = interpret(pruned, small)

    def error(reference: Mapping[str, torch.Tensor]) -> float:
        worst = 0.0
        for node, output in zip(dense.output_nodes, dense.outputs, strict=True):
            expected = selection.gather(reference[output.name], _label(analysis, node.name))
            worst = max(worst, relative_error(actual[output.name], expected))
        return worst

    roles = {role for group in analysis.groups if selection.touched(group.leaf) for role in group.roles}
    exact = not any(role in _NORMALISING or role.startswith("reduce_") for role in roles)
    return OracleReport(
        zero=error(zeroed_outputs(analysis, selection, inputs)) if exact else None,
        masked=None if selection.has_nested else error(masked_outputs(analysis, selection, inputs)),
        tolerance=tolerance(dense),
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``max |a - b| / max |b|``; infinite for different shapes, non-finite values or different integers."""
    if actual.shape != expected.shape:
        return math.inf
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    a, b = actual.double(), expected.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return 0.0 if torch.equal(a, b) else math.inf
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(actual.dtype).tiny))


def tolerance(program: Program) -> float:
    """Derived relative tolerance of a program; see the module docstring."""
    roots, unit = 0.0, 0.0
    for node in program.graph.nodes:
        value = node.meta.get("val")
        # Nothing is computed in 8-bit floats: they only store codes.
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize > 1:
            unit = max(unit, torch.finfo(value.dtype).eps / 2)
        length = _summed_terms(node)
        roots += math.sqrt(length) if length else 0.0
    return _SAFETY * unit * max(roots, 1.0)


def _summed_terms(node: fx.Node) -> int:
    """Terms each element of a contraction sums over; 0 for other operators, 1 for a dynamic length."""
    gemm = gemm_of(node)
    if gemm is not None:
        length = total([gemm.in_features, gemm.kernel])
    elif is_op(node, "aten::einsum", "aten::scaled_dot_product_attention"):
        length = shape_of(node.all_input_nodes[0].meta["val"])[-1]
    else:
        return 0
    return length if isinstance(length, int) else 1


def interpret(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain reference execution, all weights in memory; outputs by public name."""
    return _run(program, inputs, program.weights.load, _executed)


def zeroed_outputs(
    analysis: Analysis, selection: Selection, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Oracle Z: the dense program with the removed slices of every weight at zero, of a quantized one as it is dequantized."""
    program = analysis.program
    labels = {binding.tensor: _label(analysis, name) for name, binding in program.bindings.items()}

    def load(tensor: str) -> torch.Tensor:
        return _held(program.weights.load(tensor), labels[tensor], selection)

    def execute(node: fx.Node, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        value = _executed(node, arguments, keywords)
        return _held(value, _label(analysis, node.name), selection) if op_name(node) in WEIGHT_DEQUANTIZERS else value

    return _run(program, inputs, load, execute)


def masked_outputs(
    analysis: Analysis, selection: Selection, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Oracle M: the dense graph with removed positions held at zero and reductions over kept positions."""
    if selection.has_nested:
        raise ValueError("oracle M cannot express a choice that depends on an outer axis; use Z")
    program = analysis.program
    labels = {binding.tensor: _label(analysis, name) for name, binding in program.bindings.items()}

    def execute(node: fx.Node, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        special = _SPECIAL.get(op_name(node))
        if special is not None:
            given = schema_arguments(node)
            given = {**given, **dict(zip(given, arguments, strict=False)), **keywords}
            value = special(_Masked(node, given, analysis, selection))
        else:
            value = _executed(node, arguments, keywords)
        found = analysis.labels.get(node.name)
        if isinstance(found, tuple):
            return tuple(_held(item, part, selection) for item, part in zip(value, found, strict=True))
        return value if found is None else _held(value, found, selection)

    def load(tensor: str) -> torch.Tensor:
        return _held(program.weights.load(tensor), labels[tensor], selection)

    held = {
        entry.name: _held(inputs[entry.name], _label(analysis, entry.placeholder), selection)
        for entry in program.inputs
    }
    return _run(program, held, load, execute)


def _executed(node: fx.Node, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return operator_of(node)(*arguments, **keywords)


def _run(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    load: Callable[[str], torch.Tensor],
    execute: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any],
) -> dict[str, torch.Tensor]:
    names = {entry.placeholder: entry.name for entry in program.inputs}
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                tensor = program.tensor_of(node)
                values[node] = load(tensor) if tensor is not None else inputs[names[node.name]]
            elif node.op == "call_function":
                arguments = fx.map_arg(node.args, values.__getitem__)
                values[node] = execute(node, arguments, fx.map_arg(node.kwargs, values.__getitem__))
    return {output.name: values[node] for node, output in zip(program.output_nodes, program.outputs, strict=True)}


def _label(analysis: Analysis, name: str) -> Label:
    found = analysis.labels[name]
    assert isinstance(found, list)  # tensors, not tuples, cross the interface
    return found


def _held(value: Any, label: Label, selection: Selection) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    for dim, axis in enumerate(label):
        kept = selection.mask(axis)
        if kept is not None:
            value = torch.where(kept.view([-1 if place == dim else 1 for place in range(value.ndim)]), value, 0)
    return value


# -- operators that look at several positions of an axis at once


@dataclass(frozen=True)
class _Masked:
    node: fx.Node
    given: dict[str, Any]
    analysis: Analysis
    selection: Selection

    @property
    def label(self) -> Label:
        return _label(self.analysis, self.node.all_input_nodes[0].name)

    def kept(self, dim: int) -> torch.Tensor | None:
        mask = self.selection.mask(self.label[dim])
        return None if mask is None else mask.nonzero().flatten()

    def call(self, changes: Mapping[str, Any] | None = None) -> Any:
        return operator_of(self.node)(**{**self.given, **(changes or {})})


def _first_name(masked: _Masked) -> str:
    return next(iter(masked.given))


def _spread(value: torch.Tensor, dim: int, kept: torch.Tensor, size: int) -> torch.Tensor:
    shape = list(value.shape)
    shape[dim] = size
    return value.new_zeros(shape).index_copy(dim, kept, value)


def _reduce(masked: _Masked) -> Any:
    name = _first_name(masked)
    value, asked = masked.given[name], masked.given.get("dim")
    rank = value.ndim
    dims = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    positions = None
    for dim in (d % rank for d in dims):
        kept = masked.kept(dim)
        if kept is not None:
            value, positions = value.index_select(dim, kept), kept
    if "other" in masked.given:
        return masked.call()
    result = masked.call({name: value})
    if positions is None:
        return result
    if op_name(masked.node).startswith("arg"):
        return positions[result]
    return (result[0], positions[result[1]]) if isinstance(result, tuple) else result


def _along(masked: _Masked) -> Any:
    name = _first_name(masked)
    value = masked.given[name]
    dim = masked.given["dim"] % value.ndim
    kept = masked.kept(dim)
    if kept is None:
        return masked.call()
    return _spread(masked.call({name: value.index_select(dim, kept)}), dim, kept, value.shape[dim])


def _topk(masked: _Masked) -> Any:
    value, dim = masked.given["self"], masked.given["dim"] % masked.given["self"].ndim
    kept = masked.kept(dim)
    if kept is None:
        return masked.call()
    values, positions = masked.call({"self": value.index_select(dim, kept)})
    return values, kept[positions]


def _norm(masked: _Masked) -> Any:
    name = _first_name(masked)
    value, kept = masked.given[name], masked.kept(-1)
    if kept is None:
        return masked.call()
    changes: dict[str, Any] = {name: value.index_select(-1, kept)}
    if "normalized_shape" in masked.given:
        changes["normalized_shape"] = [*masked.given["normalized_shape"][:-1], len(kept)]
    for parameter in ("weight", "bias", "residual"):
        own = masked.given.get(parameter)
        if own is not None:
            changes[parameter] = own.index_select(-1, kept)
    result = masked.call(changes)
    if not isinstance(result, tuple):
        return _spread(result, value.ndim - 1, kept, value.shape[-1])
    return tuple(
        _spread(part, value.ndim - 1, kept, value.shape[-1]) if part.shape[-1] == len(kept) else part for part in result
    )


def _group_norm(masked: _Masked) -> Any:
    value, kept, channels = masked.given["input"], masked.kept(1), masked.label[1]
    if kept is None:
        return masked.call()
    size, groups = find(channels).size, masked.given["num_groups"]
    assert isinstance(size, int)  # the rule refuses dynamic channels
    outer, _ = regroup(factors(channels), [groups, size // groups])
    changes = {"input": value.index_select(1, kept), "num_groups": masked.selection.size(outer)}
    for parameter in ("weight", "bias"):
        if masked.given.get(parameter) is not None:
            changes[parameter] = masked.given[parameter].index_select(0, kept)
    return _spread(masked.call(changes), 1, kept, size)


# Not listed: cumsum. Zeros held at removed positions add nothing, and the end of an empty run stays where it was.
_SPECIAL: dict[str, Callable[[_Masked], Any]] = {
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "var", "std", "any", "all", "prod", "logsumexp", "linalg_vector_norm", "norm"),
        _reduce,
    ),
    **dict.fromkeys(("max", "min", "argmax", "argmin"), _reduce),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"), _along),
    **dict.fromkeys(("cumprod", "logcumsumexp"), _along),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm", "residual_rms_norm"), _norm),
    "group_norm": _group_norm,
    "topk": _topk,
}
