"""Low-rank layers as one tensor each: what the model's class knows, and what a checkpoint of our plugin stores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from compile_sparse.compiler.ir.edit import add_weight, eliminate_dead_code
from compile_sparse.compiler.ir.linears import Linear, find_linears
from compile_sparse.compiler.ir.program import Binding, Program
from compile_sparse.compiler.ir.weights import AbsentTensor, TensorSource

__all__ = ["FactoredTensor", "multiplied"]

_INNER, _OUTER = ".inner.weight", ".outer.weight"


@dataclass(frozen=True)
class FactoredTensor:
    """A weight ``[N, K]`` that is stored as ``outer [N, r]`` and ``inner [r, K]``. ``load`` gives their product."""

    inner: TensorSource
    outer: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.outer.shape[0], self.inner.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.outer.dtype

    def load(self) -> torch.Tensor:
        return self.outer.load() @ self.inner.load()


def multiplied(program: Program) -> tuple[Program, dict[str, FactoredTensor]]:
    """The program with each pair of thin linear layers as one again, and those weights by the name they had."""
    edited = program.clone()
    linears = {linear.node: linear for linear in find_linears(edited)[0]}
    bindings = dict(edited.bindings)
    added: dict[str, FactoredTensor] = {}
    sources: dict[str, TensorSource] = {}
    plan = not edited.weights.has_values
    for node, outer in linears.items():
        inner = linears.get(outer.input)
        if inner is None or not _is_pair(inner, outer, node):
            continue
        name = outer.tensor.removesuffix(_OUTER) + ".weight"
        made = FactoredTensor(edited.weights[inner.tensor], edited.weights[outer.tensor])
        added[name] = made
        sources[name] = AbsentTensor(made.shape, made.dtype, name) if plan else made
        weight = add_weight(edited, bindings, f"{node.name}_product", Binding(name), sources[name])
        node.replace_input_with(outer.weight, weight)
        node.replace_input_with(outer.input, inner.input)
    if not added:
        return program, {}
    return eliminate_dead_code(replace(edited, weights=edited.weights.updated(sources), bindings=bindings)), added


def _is_pair(inner: Linear, outer: Linear, node: fx.Node) -> bool:
    stems = inner.tensor.removesuffix(_INNER), outer.tensor.removesuffix(_OUTER)
    named = inner.tensor.endswith(_INNER) and outer.tensor.endswith(_OUTER) and stems[0] == stems[1]
    return named and inner.axis == outer.axis == 1 and list(inner.node.users) == [node]
