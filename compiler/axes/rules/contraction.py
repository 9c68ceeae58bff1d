"""GEMMs: the contracted dimensions are one axis, the others pass through."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import fx

from compile_sparse.compiler.axes.algebra import Axis, find
from compile_sparse.compiler.axes.analysis_state import Label
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.nodes import node_argument
from compile_sparse.compiler.ir.sizes import shape_of

__all__: list[str] = []


@rule("linear")
def linear(step: RuleContext) -> Labels:
    """``y[..., o] = sum_i x[..., i] W[o, i] + b[o]``."""
    x, weight, bias = step.label("input"), step.label("weight"), step.optional("bias")
    step.tie(x[-1], weight[1])
    step.contract(step.arguments["input"], len(x) - 1, step.arguments["weight"], weight[1])
    if bias is not None:
        step.tie(weight[0], bias[0])
    step.produce(step.arguments["weight"], weight[0])
    return [*x[:-1], weight[0]]


@rule("mm", "bmm", "matmul")
def matmul(step: RuleContext) -> Labels | None:
    """``y[..., m, n] = sum_k a[..., m, k] b[..., k, n]``; leading dimensions broadcast."""
    return _gemm(step, step.first, node_argument(step.node, 1), step.value)


def _gemm(step: RuleContext, left: fx.Node, right: fx.Node, value: torch.Tensor) -> Label | None:
    a, b = step.label(left), step.label(right)
    if len(a) < 2 or len(b) < 2:
        return None
    step.tie(a[-1], b[-2])
    step.contract(left, len(a) - 1, right, a[-1])
    # Either side may hold the weights; a later reader keeps the contacts whose weight side is a parameter.
    step.contract(right, len(b) - 2, left, a[-1])
    batch = step.broadcast([a[:-2], b[:-2]], shape_of(value)[:-2])
    for axis in batch:
        step.role(axis, "batch_matmul")
    step.produce(right, b[-1])
    step.produce(left, a[-2])
    if not (step.is_weight(left) or step.is_weight(right)):
        # Attention written out: q k^T, then the probabilities times v.
        step.role(a[-1], "qk_dim")
        step.role(b[-1], "v_dim")
    return [*batch, a[-2], b[-1]]


@rule("addmm", "baddbmm")
def addmm(step: RuleContext) -> Labels | None:
    """``beta * c + alpha * (a @ b)``."""
    out = _gemm(step, node_argument(step.node, 1), node_argument(step.node, 2), step.value)
    if out is None:
        return None
    return step.broadcast([out, step.label(step.first)], shape_of(step.value))


@rule("einsum")
def einsum(step: RuleContext) -> Labels | None:
    """Letters are axes; letters missing on the right are summed over. ``...`` stands for leading dimensions that broadcast."""
    tensors = step.arguments["tensors"]
    terms, result = _spelled_out(step.arguments["equation"].replace(" ", ""), [n.meta["val"].ndim for n in tensors])
    axes: dict[str, Axis] = {}
    for term, node in zip(terms, tensors, strict=True):
        if len(set(term)) != len(term):  # a diagonal
            return None
        for letter, axis in zip(term, step.label(node), strict=True):
            if letter in axes and 1 in (find(axes[letter]).size, find(axis).size):  # stretched
                axes[letter] = axis if find(axes[letter]).size == 1 else axes[letter]
            else:
                axes[letter] = step.tie(axes[letter], axis) if letter in axes else axis
    for letter, axis in axes.items():
        holders = [(term, node) for term, node in zip(terms, tensors, strict=True) if letter in term]
        if letter not in result:
            step.role(axis, "contract")
            for (term, node), (_, other) in permutations(holders, 2):
                step.contract(node, term.index(letter), other, axis)
        elif len(holders) == 1:
            step.produce(holders[0][1], axis)
    return [axes[letter] for letter in result]


def _spelled_out(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Terms and result of an equation, ``...`` replaced by capital Greek letters aligned on the right, the result written."""
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    wide = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for rank, term in zip(ranks, terms, strict=True)
    ]
    spare = "".join(chr(ord("\N{GREEK CAPITAL LETTER ALPHA}") + place) for place in range(max(wide, default=0)))
    terms = [term.replace("...", spare[len(spare) - count :]) for term, count in zip(terms, wide, strict=True)]
    if arrow:
        return terms, result.replace("...", spare)
    every = "".join(terms)
    return terms, spare + "".join(sorted(c for c in set(every) if every.count(c) == 1 and c not in spare))


@rule("transformers::grouped_mm_fallback", "_grouped_mm")
def grouped_mm(step: RuleContext) -> Labels | None:
    """Rows ``x[t, k]`` in runs, one run per expert: ``y[t, n] = sum_k x[t, k] W[e(t), k, n]``, ends of runs in ``offs[e]``."""
    tensors = step.operands
    if len(tensors) < 3:
        return None
    x, weight, ends = (step.label(node) for node in tensors[:3])
    if len(x) != 2 or len(weight) != 3 or len(ends) != 1:
        return None
    step.tie(weight[0], ends[0])
    step.tie(x[1], weight[1])
    step.contract(tensors[0], 1, tensors[1], weight[1])
    step.produce(tensors[1], weight[2])
    return [x[0], weight[2]]
