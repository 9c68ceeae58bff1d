"""``linear(x, W)`` as ``linear(linear(x, inner), outer)`` in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from compile_sparse.compiler.ir.edit import add_weight, eliminate_dead_code, fake_mode_of, op_name
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.nodes import operator_of
from compile_sparse.compiler.ir.program import Binding, Program
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, LastComputed, TensorSource
from compile_sparse.passes.factoring.factors import Factors

__all__ = ["FactorSources", "lazy_factors", "replace_by_factors"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FactorSources:
    """Where the two weights of a factored linear come from: ``inner [r, K]`` and ``outer [N, r]``."""

    inner: TensorSource
    outer: TensorSource


def lazy_factors(
    memory: LastComputed[Factors],
    name: str,
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    compute: Callable[[], Factors],
) -> FactorSources:
    """Factors of the weight called ``name``, ``[N, K]``, made when one of them is loaded; ``compute`` gives them at ``rank``.

    ``memory`` is shared by the layers of a model: each is decomposed once while its two tensors are read in turn.
    """

    def factors() -> Factors:
        return memory.get(name, compute)

    return FactorSources(
        DerivedTensor((rank, shape[1]), dtype, lambda: factors().inner.to(dtype)),
        DerivedTensor((shape[0], rank), dtype, lambda: factors().outer.to(dtype)),
    )


def replace_by_factors(program: Program, factors: Mapping[str, FactorSources]) -> Program:
    """A program in which each named linear is two, the second under the old name and with the old bias.

    ``W`` as ``[N, K]`` (linear) becomes ``[r, K]`` and ``[N, r]``; as ``[K, N]`` (addmm, mm, matmul) ``[K, r]`` and ``[r, N]``.
    The weights of ``a.b.weight`` are stored as ``a.b.inner.weight`` and ``a.b.outer.weight``.

    Args:
        program: is not changed.
        factors: by name of the linear's node.
    """
    edited = program.clone()
    bindings, added = dict(edited.bindings), {}
    for linear in find_linears(edited)[0]:
        if linear.node.name not in factors:
            continue
        pair = factors[linear.node.name]
        weights = []
        for part, source in (("inner", pair.inner), ("outer", pair.outer)):
            tensor = _renamed(linear.tensor, part)
            added[tensor] = source if linear.axis == 1 else _transposed(source)
            weights.append(add_weight(edited, bindings, f"{linear.weight.name}_{part}", Binding(tensor), added[tensor]))
        node, inner, outer = linear.node, *weights
        gemm = aten.mm.default if op_name(node) == "addmm" else operator_of(node)
        with edited.graph.inserting_before(node):
            first = edited.graph.create_node("call_function", gemm, (linear.input, inner), name=f"{node.name}_inner")
        with fake_mode_of(edited):
            first.meta["val"] = gemm(linear.input.meta["val"], inner.meta["val"])
        node.args = tuple(_swapped(arg, {linear.input: first, linear.weight: outer}) for arg in node.args)
    return eliminate_dead_code(replace(edited, bindings=bindings, weights=edited.weights.updated(added)))


def _swapped(argument: fx.node.Argument, by: Mapping[fx.Node, fx.Node]) -> fx.node.Argument:
    return by.get(argument, argument) if isinstance(argument, fx.Node) else argument


def _renamed(tensor: str, part: str) -> str:
    stem, dot, last = tensor.rpartition(".")
    return f"{stem}.{part}.{last}" if dot else f"{tensor}.{part}"


def _transposed(source: TensorSource) -> TensorSource:
    shape = (source.shape[1], source.shape[0])
    if isinstance(source, AbsentTensor):
        return AbsentTensor(shape, source.dtype, source.name)
    return DerivedTensor(shape, source.dtype, lambda: source.load().t().contiguous())
