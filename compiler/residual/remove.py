"""Depth pruning: a program without some of its residual branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import fx

from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.edit import eliminate_dead_code, op_name
from compile_sparse.compiler.ir.nodes import node_argument
from compile_sparse.compiler.ir.program import Input, Output, Program
from compile_sparse.compiler.residual.branches import Branch, carried, find_blocks, same_type

__all__ = ["Dropped", "drop_branches"]


@dataclass(frozen=True)
class Dropped:
    """A program without some of its branches.

    Attributes:
        program: the new program; surviving nodes and weights keep their names.
        stands_for: sum (``Branch.add``) that survives in ``program`` -> sum of the *dense* program whose value it now stands
            for, because the branches that made the difference are gone. A consumer that wants the dense stream back refits
            the surviving term of the key on the value. Both hold the same rows after ``flatten(0, -2)``. No entry where the
            stream comes from the embedding, or where a norm follows each sum (post-norm) and hides it.
    """

    program: Program
    stands_for: Mapping[str, str]


def drop_branches(program: Program, branches: Sequence[Branch]) -> Dropped:
    """``program`` without ``branches``, which were found in it.

    A sum keeps its other terms, and a sum that has lost all but the stream is the stream. Where every branch of a block goes,
    so do the norms and reshapes after its sums, if every block has them: a post-norm block is removed whole, while a post-norm
    branch alone leaves its norm. Cache inputs and outputs of removed attention go, the others are renumbered. Other inputs
    stay, used or not. No weight is read.

    Raises:
        ModelError: CS2111 when a decoder would have no attention with a cache left: runtimes read the length of what was seen
            from a cache, and so do most graphs.
    """
    blocks = find_blocks(program)
    known = {branch.output: branch for block in blocks for branch in block.branches}
    gone = {branch.output for branch in branches}
    if not gone <= known.keys():
        raise KeyError(f"no branches of this program: {sorted(gone - known.keys())}")
    if not gone:
        return Dropped(program, {})
    whole = [block for block in blocks if all(branch.output in gone for branch in block.branches)]
    edited = program.clone()
    nodes = {node.name: node for node in edited.graph.nodes}
    replaced: dict[str, fx.Node] = {}
    for branch in branches:
        _remove_term(nodes[branch.output], replaced)
    for block in reversed(whole):  # the last first: the end of one block is the start of the next
        _remove_carriers(nodes[block.end], nodes[block.start])
    caches = {layer for branch in branches for layer in branch.caches}
    result = eliminate_dead_code(_without_caches(edited, caches)) if caches else eliminate_dead_code(edited)
    aliases = {name: bound for name, bound in result.aliases.items() if bound in result.weights}
    return Dropped(replace(result, aliases=aliases), _stands_for(program, tuple(known.values()), gone, replaced))


def _remove_term(term: fx.Node, replaced: dict[str, fx.Node]) -> None:
    (addition,) = term.users
    other = node_argument(addition, 0 if addition.args[1] is term else 1)
    addition.replace_all_uses_with(other)
    replaced[addition.name] = other
    addition.graph.erase_node(addition)


def _remove_carriers(end: fx.Node, start: fx.Node) -> None:
    """Make ``end`` the stream before the block, when only carriers are left between them."""
    if carried(end, start) and same_type(start, end):
        end.replace_all_uses_with(start)


def _without_caches(program: Program, gone: set[int]) -> Program:
    """Without the cache inputs and outputs of layers ``gone``; the others are numbered from 0."""
    kept = sorted({entry.layer for entry in program.inputs if entry.layer >= 0} - gone)
    if not kept:
        raise _no_cache_left(f"layers {', '.join(map(str, sorted(gone)))}")
    number = {layer: index for index, layer in enumerate(kept)}
    results = [
        (node, output)
        for node, output in zip(program.output_nodes, program.outputs, strict=True)
        if output.layer not in gone
    ]
    output_node = next(iter(reversed(program.graph.nodes)))
    output_node.args = (tuple(node for node, _ in results),)
    eliminate_dead_code(program)  # what read the caches of removed attention must be gone before the inputs can go
    inputs = [entry for entry in program.inputs if entry.layer not in gone]
    for entry in program.inputs:
        if entry.layer in gone:
            placeholder = program.node(entry.placeholder)
            for user in list(placeholder.users):
                _read_elsewhere(user, [program.node(kept_entry.placeholder) for kept_entry in inputs])
            program.graph.erase_node(placeholder)
    return replace(
        program,
        inputs=tuple(_renumbered(entry, number) for entry in inputs),
        outputs=tuple(_renumbered(output, number) for _, output in results),
    )


def _read_elsewhere(size: fx.Node, inputs: Sequence[fx.Node]) -> None:
    """Let ``size``, a dimension of a cache that goes, be read from another input that has the same dimension."""
    wanted = str(size.meta["val"])
    for node in inputs:
        for dim, length in enumerate(node.meta["val"].shape):
            if op_name(size) == "sym_size" and str(length) == wanted:
                size.args = (node, dim)
                return
    raise _no_cache_left(size.name)


def _no_cache_left(where: str) -> ModelError:
    return ModelError(
        "CS2111",
        "The last attention with a key-value cache cannot be removed.",
        where=where,
        why="A decoder reads the number of tokens it has seen from a cache, and none would be left.",
        hint="Remove fewer layers.",
    )


def _renumbered(entry: Any, number: Mapping[int, int]) -> Any:
    if not isinstance(entry, (Input, Output)) or entry.layer < 0:
        return entry
    new = number[entry.layer]
    return replace(entry, name=entry.name.replace(f".{entry.layer}.", f".{new}."), layer=new)


def _stands_for(
    program: Program, branches: Sequence[Branch], gone: set[str], replaced: Mapping[str, fx.Node]
) -> dict[str, str]:
    """See ``Dropped``: walk along the stream, remembering the last sum that is still there."""
    found: dict[str, str] = {}
    current = before = ""
    for add, of_sum in groupby(branches, key=lambda branch: branch.add):
        terms = list(of_sum)
        stream = program.node(terms[0].skip)
        while op_name(stream) == "reshape":
            stream = node_argument(stream)
        if stream.name != before:
            current = ""
        if add not in replaced:
            current = add
        if current and any(branch.output in gone for branch in terms):
            found[current] = add
        before = add
    return found
