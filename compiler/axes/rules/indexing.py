"""Operators that address an axis by values.

An axis addressed by data is frozen, unless the values are known to be positions *along an axis* (a domain, see ``RuleContext``):
then the two are the same axis, and both shrink together. That is how expert choice by top-k stays prunable.
"""

from __future__ import annotations

import torch
from torch import fx

from compile_sparse.compiler.axes.algebra import Axis, find, is_dynamic, one
from compile_sparse.compiler.axes.rule_context import RuleContext
from compile_sparse.compiler.axes.rules.registry import Labels, rule
from compile_sparse.compiler.ir.sizes import shape_of, size_of

__all__: list[str] = []


def _address(step: RuleContext, axis: Axis, index: fx.Node, data: str = "its positions are addressed by data") -> None:
    domain = step.domain(index)
    if domain is not None and find(domain).size == find(axis).size:
        step.tie(axis, domain)
        step.role(axis, "selected")
        return
    if domain is not None:
        step.freeze(domain, f"op '{step.name}' addresses another dimension with positions along it")
    if not is_dynamic(axis):
        stored = "its positions are addressed by a stored table of indices"
        step.freeze(axis, stored if step.is_weight(index) else data)


@rule("embedding")
def embedding(step: RuleContext) -> Labels:
    """``W[v, d]`` read by row."""
    weight, indices = step.label("weight"), step.label("indices")
    _address(step, weight[0], step.arguments["indices"], "ids look its rows up, so any of them may be needed")
    step.role(weight[0], "vocab")
    step.role(weight[1], "embedding")
    step.produce(step.arguments["weight"], weight[1])
    return [*indices, weight[1]]


@rule("index")
def index(step: RuleContext) -> Labels | None:
    """Advanced indexing by integer tensors; other dimensions pass through."""
    source, given = step.label(step.first), step.arguments["indices"]
    where = [place for place, item in enumerate(given) if item is not None]
    if any(given[place].meta["val"].dtype in (torch.bool, torch.uint8) for place in where):
        return None
    for place in where:
        _address(step, source[place], given[place])
    step.pass_domain(step.first)
    labels = [step.label(given[place]) for place in where]
    rank = max(len(label) for label in labels)
    together = where == list(range(where[0], where[-1] + 1))
    at = where[0] if together else 0
    picked = step.broadcast(labels, shape_of(step.value)[at : at + rank])
    rest = [axis for place, axis in enumerate(source) if place not in where]
    return rest[:at] + picked + rest[at:]


@rule("index_put")
def index_put(step: RuleContext) -> Labels:
    """Writes at positions given by data: nothing static may change."""
    for node in step.operands:
        for axis in step.label(node):
            if not is_dynamic(axis):
                step.freeze(axis, "positions are written by data")
    return step.label(step.first)


@rule("index_select")
def index_select(step: RuleContext) -> Labels:
    """Positions along one dimension."""
    out = step.label(step.first)
    dim = step.arguments["dim"] % len(out)
    _address(step, out[dim], step.arguments["index"])
    step.pass_domain(step.first)
    out[dim : dim + 1] = step.label("index") or [one()]
    return out


@rule("gather")
def gather(step: RuleContext) -> Labels | None:
    """``x[i[p]]`` along ``dim``; along the others x and i run together."""
    source, picked = step.label(step.first), step.label("index")
    dim = step.arguments["dim"] % len(source)
    _address(step, source[dim], step.arguments["index"])
    step.pass_domain(step.first)
    for place, (axis, other) in enumerate(zip(source, picked, strict=True)):
        if place == dim:
            continue
        if find(axis).size != find(other).size:  # a prefix is read: positions matter
            return None
        step.tie(axis, other)
    return picked


@rule("topk")
def topk(step: RuleContext) -> Labels:
    """Largest ``k`` and their positions; the positions' domain is the searched axis."""
    source = step.label(step.first)
    dim = step.arguments["dim"] % len(source)
    step.role(source[dim], "topk")
    step.set_domain(source[dim], output=1)
    source[dim] = step.frozen(size_of(step.value[0].shape[dim]), "it counts the chosen positions")
    return (source, list(source))


@rule("sort")
def sort(step: RuleContext) -> Labels:
    """Order depends on values; a domain survives because deletion keeps the order of positions."""
    source = step.label(step.first)
    dim = step.arguments.get("dim", -1) % len(source)
    if not is_dynamic(source[dim]):
        step.freeze(source[dim], "op 'sort' reorders it by value")
    domain = step.domain(step.first)
    if domain is not None:
        step.set_domain(domain, output=0)
    return (source, list(source))


@rule("histc")
def histc(step: RuleContext) -> Labels | None:
    """Counts per position, when bins are exactly the positions of a domain."""
    domain, bins = step.domain(step.first), step.arguments["bins"]
    if domain is None or find(domain).size != bins:
        return None
    if step.arguments["min"] != 0 or step.arguments["max"] != bins - 1:
        return None
    return [domain]


@rule("one_hot")
def one_hot(step: RuleContext) -> Labels | None:
    """A new dimension per position of a domain."""
    domain, classes = step.domain(step.first), step.arguments["num_classes"]
    if domain is None or find(domain).size != classes:
        return None
    return [*step.label(step.first), domain]
