"""Residual branches: the pieces of a model that only add to a stream.

A branch is a term of a sum that also holds the value the term was computed from::

    stream' = stream + f(stream)

Attention and the MLP of a transformer block are two such branches, one after the other, or two terms of one sum in models that
compute them in parallel. They are found in the graph alone, without module names. Without ``f`` the sum is the stream itself,
so ``compiler/residual/remove.py`` can remove a branch and nothing has to be known about ``f``.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import fx

from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.gemms import BATCHED, WITHOUT_FORM, is_convolution, multiplies
from compile_sparse.compiler.ir.nodes import node_argument, qualified_name
from compile_sparse.compiler.ir.program import Program

__all__ = ["Block", "Branch", "BranchKind", "carried", "find_blocks", "find_branches", "same_type"]

BranchKind = Literal["attention", "mlp", "other"]

_COPIES = {"reshape", "expand", "_to_copy", "to", "type_as", "dropout", "clone"}
_CARRIERS = {"layer_norm", "rms_norm", "reshape"}
"""What may stand between the sum of one branch and the stream that the next one reads (the norm of a post-norm model)."""


@dataclass(frozen=True)
class Branch:
    """One term of a residual sum. All fields are names in the program it was found in.

    Attributes:
        add: the whole sum: the stream after this branch and those parallel to it.
        skip: the stream before it, itself a term of the sum.
        output: the term; nothing but the sum uses it.
        nodes: what dies with it, in graph order: weights, cache inputs and calls that nothing else needs.
        weights: stored tensors that only it reads.
        kind: ``attention``, ``mlp`` (GEMMs, neither attention nor convolution) or ``other``.
        layer: index of its block: an attention opens a block, the next MLP closes it, parallel branches share one.
        caches: layers of the key-value cache that it reads and writes.
    """

    add: str
    skip: str
    output: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    kind: BranchKind
    layer: int
    caches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """A stretch of the stream: an attention and the MLP after it, or whatever the model repeats.

    Attributes:
        start: node that holds the stream before the block.
        end: the stream after it, its closing norm included in post-norm models.
        branches: its branches in graph order.
    """

    start: str
    end: str
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class _Term:
    """A branch before it is described: ``node`` is computed from ``skip`` through ``between`` (``node`` included)."""

    skip: fx.Node
    node: fx.Node
    between: frozenset[fx.Node]

    @property
    def kind(self) -> BranchKind:
        if any(_is_attention(node) for node in self.between):
            return "attention"
        return "other" if any(is_convolution(node) for node in self.between) else "mlp"


def find_branches(program: Program) -> tuple[Branch, ...]:
    """Residual branches in graph order; of nested ones, the outermost.

    A sum counts when everything computed from its skip operand towards its other terms is used for these terms alone, or is
    the branch's own key-value cache.
    """
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    caches = _cache_outputs(program)
    found: list[tuple[fx.Node, list[_Term]]] = []
    inside: set[fx.Node] = set()
    for root, additions, operands in _sums(program.graph):
        terms = [term for term in (_branch(node, operands, place) for node in operands) if term is not None]
        interior = {node for term in terms for node in term.between}
        if terms and _is_private(interior, additions, caches):
            found.append((root, terms))
            inside |= interior
    outermost = [(root, terms) for root, terms in found if root not in inside]
    layers = _layers([[term.kind for term in terms] for _, terms in outermost])
    holders = Counter(binding.tensor for binding in program.bindings.values())
    branches: list[Branch] = []
    for (root, terms), layer in zip(outermost, layers, strict=True):
        for term in terms:
            nodes = sorted(_private_to(term, place, caches), key=lambda node: place[node])
            tensors = Counter(name for node in nodes if (name := program.tensor_of(node)) is not None)
            branches.append(
                Branch(
                    add=root.name,
                    skip=term.skip.name,
                    output=term.node.name,
                    nodes=tuple(node.name for node in nodes),
                    weights=tuple(name for name, count in tensors.items() if count == holders[name]),
                    kind=term.kind,
                    layer=layer,
                    caches=tuple(sorted({caches[node] for node in term.between if node in caches})),
                )
            )
    return tuple(branches)


def _sums(graph: fx.Graph) -> Iterator[tuple[fx.Node, set[fx.Node], list[fx.Node]]]:
    """Sums of two or more operands: last addition, all additions, operands from left to right."""
    additions = {node for node in graph.nodes if _is_addition(node)}
    inner = {node for node in additions if len(node.users) == 1 and next(iter(node.users)) in additions}
    for root in graph.nodes:
        if root not in additions or root in inner:
            continue
        members, operands, waiting = {root}, [], list(reversed(root.args[:2]))
        while waiting:
            node = waiting.pop()
            if node in inner:
                members.add(node)
                waiting += reversed(node.args[:2])
            else:
                operands.append(node)
        yield root, members, operands


def _is_addition(node: fx.Node) -> bool:
    """``a + b`` of two different floating-point tensors of one shape and dtype."""
    if op_name(node) != "add" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    operands = node.args[:2]
    if len(operands) != 2 or operands[0] is operands[1] or schema_arguments(node).get("alpha", 1) != 1:
        return False
    return node.meta["val"].is_floating_point() and all(same_type(operand, node) for operand in operands)


def same_type(left: Any, right: fx.Node) -> bool:
    """Whether both are nodes with tensors of one shape and dtype."""
    a, b = (node.meta.get("val") if isinstance(node, fx.Node) else None for node in (left, right))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and tuple(map(str, a.shape)) == tuple(map(str, b.shape))


def _branch(node: fx.Node, operands: Sequence[fx.Node], place: Mapping[fx.Node, int]) -> _Term | None:
    """``node`` as a branch, when it was computed from another operand by at least one GEMM or attention."""
    if len(node.users) != 1:
        return None
    earlier = [other for other in operands if place[other] < place[node]]
    for skip in sorted(earlier, key=lambda other: place[other], reverse=True):
        between = _between(skip, node, place)
        if any(multiplies(inner) or _is_attention(inner) for inner in between):
            return _Term(skip, node, frozenset(between))
    return None


def _between(skip: fx.Node, last: fx.Node, place: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Nodes that depend on ``skip`` and that ``last`` depends on, ``last`` included; empty when it does not."""
    behind, waiting = {last}, [last]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if place[n] > place[skip] and n not in behind]
        behind.update(new)
        waiting += new
    reached = {skip}
    for node in sorted(behind, key=lambda n: place[n]):
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached - {skip} if last in reached else set()


def _is_private(interior: set[fx.Node], additions: set[fx.Node], caches: Mapping[fx.Node, int]) -> bool:
    allowed = interior | additions
    return all(user in allowed or (user.op == "output" and node in caches) for node in interior for user in node.users)


def _cache_outputs(program: Program) -> dict[fx.Node, int]:
    """Nodes that are outputs as part of the cache and nothing else -> layer."""
    pairs = list(zip(program.output_nodes, program.outputs, strict=True))
    others = {node for node, output in pairs if output.role not in ("present_key", "present_value")}
    return {node: output.layer for node, output in pairs if node not in others}


def _is_attention(node: fx.Node) -> bool:
    """Attention as one op, or a softmax whose result is multiplied with a matrix. A router's softmax selects instead."""
    if "scaled_dot_product" in op_name(node):
        return True
    if op_name(node) not in ("softmax", "_softmax"):
        return False
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if qualified_name(user) in BATCHED.keys() | WITHOUT_FORM:
            return True
        if op_name(user) in _COPIES:
            waiting += user.users
    return False


def _layers(kinds: Sequence[Sequence[BranchKind]]) -> list[int]:
    """Block index of each sum."""
    layers: list[int] = []
    layer, closed = -1, True
    for of_sum in kinds:
        if closed or "attention" in of_sum or "other" in of_sum:
            layer += 1
        closed = list(of_sum) != ["attention"]
        layers.append(layer)
    return layers


def _private_to(term: _Term, place: Mapping[fx.Node, int], caches: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Nodes that nothing needs once the sum has lost ``term``."""
    private = {term.node}
    waiting = [-place[node] for node in term.node.all_input_nodes]
    heapq.heapify(waiting)
    by_place = list(place)
    while waiting:  # in reverse graph order, so that the users of a node are settled before the node
        node = by_place[-heapq.heappop(waiting)]
        written = node in caches and node in term.between
        if node not in private and all(u in private or (written and u.op == "output") for u in node.users):
            private.add(node)
            for source in node.all_input_nodes:
                heapq.heappush(waiting, -place[source])
    return private


def find_blocks(program: Program) -> tuple[Block, ...]:
    """The branches of ``program`` by block, in graph order."""
    groups = [tuple(found) for _, found in groupby(find_branches(program), key=lambda branch: branch.layer)]
    nodes = {node.name: node for node in program.graph.nodes}
    sums = [nodes[group[-1].add] for group in groups]
    following = [nodes[group[0].skip] for group in groups[1:]]
    chains = [carried(end, start) for start, end in zip(sums, following, strict=False)]
    # What follows most blocks belongs to the block; anything else between two blocks is a piece of its own.
    usual = Counter(tuple(map(op_name, chain)) for chain in chains).most_common(1)
    expected = usual[0][0] if usual else ()
    chains += [_follow(node, expected) for node in sums[-1:]]
    ends = [
        chain[-1].name if chain and tuple(map(op_name, chain)) == expected else node.name
        for chain, node in zip(chains, sums, strict=True)
    ]
    return tuple(Block(group[0].skip, end, group) for group, end in zip(groups, ends, strict=True))


def carried(end: fx.Node, start: fx.Node) -> list[fx.Node]:
    """Nodes after ``start`` up to ``end``, all of them carriers; empty when there is no such chain."""
    chain: list[fx.Node] = []
    while end is not start:
        if op_name(end) not in _CARRIERS:
            return []
        chain.append(end)
        end = node_argument(end)
    return chain[::-1]


def _follow(node: fx.Node, expected: Sequence[str]) -> list[fx.Node]:
    """The chain of ``expected`` operators after ``node``; empty when its users are others."""
    chain: list[fx.Node] = []
    for name in expected:
        if [op_name(user) for user in node.users] != [name]:
            return []
        (node,) = node.users
        chain.append(node)
    return chain
