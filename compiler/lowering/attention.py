"""Raise causal attention with a key-value cache, with or without the rotary embedding.

    keys = cat(past_key, k), values = cat(past_value, v)                      k: [B, kv, S, D]
    sdpa(q, repeat(keys), repeat(values), mask)                               q: [B, H, S, D]
        ->  cached_attention(query [B, S, H * D], key, value, past_key, past_value, attention_mask, cos, sin, ...)

Each operand is traced back to ``[B, S, heads * D]``; for most models that is the linear's own output, so the transposes
vanish. The rotation moves into the operator when both q and k are rotated by the same proved angles; otherwise it stays outside
and the operator gets rotated operands. The mask must be proved causal (see ``causality``). Positions inside the operator are
``past .. past + S - 1``, which is what a caller gives for right padding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.extension.pass_contract import PassResult
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions, insert_call, is_op, module_of, node_argument, same_dimension
from compile_sparse.compiler.ir.program import Binding, Program
from compile_sparse.compiler.lowering.causality import CausalityProver, CausalMask
from compile_sparse.compiler.lowering.rotary import RotaryTables, match_rotation
from compile_sparse.compiler.lowering.steps import raised

__all__ = ["AttentionShape", "RaiseAttention"]

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class AttentionShape:
    """What a backend needs to know to accept or refuse one attention."""

    num_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    rotary: bool
    window: int


@dataclass(frozen=True)
class _Cache:
    """``node = cat([past, new], 2)`` and the nodes that only repeat it over the query heads."""

    node: fx.Node
    past: fx.Node
    new: fx.Node
    repeat: tuple[fx.Node, ...]


@dataclass(frozen=True)
class RaiseAttention:
    """See the module. In decoders only: other models have no cache.

    Attributes:
        refuse: a backend's say: a sentence when its kernel cannot run this shape, or an empty string.
    """

    refuse: Callable[[AttentionShape], str]
    name: ClassVar[str] = "raise attention"

    def run(self, program: Program, context: object = None) -> PassResult:
        """Replace every match; CS2302 (form), CS2303 (mask), CS2304 (rotation left outside) and CS2305 (backend) otherwise.

        Raises:
            ModelError: CS2001, the program has no weights and the rotation's angles need one.
        """
        if program.kind != "decoder":
            return PassResult(program, modified=False)
        raiser = _Raiser(program.clone(), self.refuse)
        for node in list(raiser.program.graph.nodes):
            if is_op(node, "aten::scaled_dot_product_attention"):
                raiser.visit(node)
        edited = replace(raiser.program, weights=program.weights.updated(raiser.tables.sources))
        return raised(program, edited, raiser.count, raiser.diagnostics, bindings=raiser.bindings)


class _Raiser:
    def __init__(self, program: Program, refuse: Callable[[AttentionShape], str]) -> None:
        self.program, self.refuse = program, refuse
        self.bindings: dict[str, Binding] = dict(program.bindings)
        self.count = 0
        self.diagnostics: list[Diagnostic] = []
        self.masks = CausalityProver(program)
        self.tables = RotaryTables(program, self.bindings)
        by_role: dict[str, set[str]] = {}
        for entry in program.inputs:
            by_role.setdefault(entry.role, set()).add(entry.placeholder)
        self.past = by_role.get("past_key", set()) | by_role.get("past_value", set())
        self.mask_input = next(iter(by_role.get("attention_mask", ())), None)

    def visit(self, sdpa: fx.Node) -> None:
        """Raise one attention or say why not."""
        given = schema_arguments(sdpa)
        keys, values = self._cache(given["key"]), self._cache(given["value"])
        if keys is None or values is None:
            return self._leave(sdpa, "CS2302", "Keys and values are not the cached ones followed by the new ones.")
        if given["dropout_p"] or given["is_causal"] or given["scale"] is None:
            return self._leave(sdpa, "CS2302", "The attention has dropout, an implicit mask or no explicit scale.")
        if self.mask_input is None or not isinstance(given["attn_mask"], fx.Node):
            return self._leave(sdpa, "CS2303", "There is no attention mask that could be proved causal.")
        mask = self.masks.prove(given["attn_mask"])
        if not isinstance(mask, CausalMask):
            return self._leave(sdpa, "CS2303", f"The attention mask stays explicit: {mask}.")
        self._rewrite(sdpa, given["query"], keys, values, mask, float(given["scale"]))
        return None

    def _leave(self, node: fx.Node, code: str, why: str) -> None:
        self.diagnostics.append(
            Diagnostic(node.name, code, why, "The attention runs in its written form, correct but slower.")
        )

    def _cache(self, node: Any) -> _Cache | None:
        repeat: list[fx.Node] = []
        while is_op(node, "aten::reshape", "aten::expand", "aten::unsqueeze", "aten::clone", "aten::repeat_interleave"):
            repeat.append(node)
            node = node.args[0]
        if not is_op(node, "aten::cat") or schema_arguments(node)["dim"] not in (2, -2) or len(node.args[0]) != 2:
            return None
        past, new = node.args[0]
        if past.name not in self.past or (repeat and not _repeats_heads(repeat, node)):
            return None
        return _Cache(node, past, new, tuple(repeat))

    def _rewrite(
        self, sdpa: fx.Node, query: fx.Node, keys: _Cache, values: _Cache, mask: CausalMask, scale: float
    ) -> None:
        if not self._may_replace(keys, sdpa) or not self._may_replace(values, sdpa):
            return self._leave(sdpa, "CS2302", "The cache is read by other operators before the attention.")
        heads, size = dimensions(query)[1], dimensions(query)[3]
        kv_heads, value_size = dimensions(keys.node)[1], dimensions(values.node)[3]
        given_query, key = query, keys.new
        cos = sin = None
        rotated_q, rotated_k = match_rotation(query), match_rotation(key)
        if rotated_q and rotated_k and (rotated_q.cos, rotated_q.sin) == (rotated_k.cos, rotated_k.sin):
            tables = self.tables.placeholders(rotated_q)
            if isinstance(tables, str):
                self.diagnostics.append(
                    Diagnostic(sdpa.name, "CS2304", f"The rotary embedding stays outside the attention: {tables}.")
                )
            else:
                cos, sin = tables
                query, key = rotated_q.x, rotated_k.x
        shape = AttentionShape(int(heads), int(kv_heads), int(size), int(value_size), cos is not None, mask.window)
        refusal = self.refuse(shape)
        if refusal and cos is not None:
            # The rotation may be what the kernel cannot do; the model's own stays outside then.
            self.diagnostics.append(
                Diagnostic(sdpa.name, "CS2304", f"The rotary embedding stays outside the attention: {refusal}")
            )
            query, key, cos, sin = given_query, keys.new, None, None
            shape = replace(shape, rotary=False)
            refusal = self.refuse(shape)
        if refusal:
            return self._leave(sdpa, "CS2305", refusal)
        graph = self.program.graph
        with graph.inserting_before(sdpa):
            flat = [_flattened(graph, node) for node in (query, key, values.new)]
            attention = graph.call_function(
                torch.ops.compile_sparse.cached_attention.default,
                (
                    *(*flat, keys.past, values.past, self.program.node(str(self.mask_input)), cos, sin),
                    *(shape.num_heads, shape.kv_heads, scale, mask.window),
                ),
            )
            attention.meta.update(module_of(sdpa))
            merged = _merged_output(sdpa)
            batch, length = dimensions(sdpa)[0], dimensions(sdpa)[2]
            flat_value = (
                merged.meta["val"]
                if merged is not None
                else flat[0].meta["val"].new_empty(batch, length, shape.num_heads * shape.value_size)
            )
            attention.meta["val"] = (flat_value, keys.node.meta["val"], values.node.meta["val"])
            out, new_keys, new_values = (
                insert_call(graph, operator.getitem, (attention, index), value=attention.meta["val"][index])
                for index in range(3)
            )
        if merged is not None:
            merged.replace_all_uses_with(out)
        else:
            with graph.inserting_after(out):
                split = insert_call(graph, _ATEN.unflatten.int, (out, 2, [shape.num_heads, shape.value_size]))
            with graph.inserting_after(split):
                sdpa.replace_all_uses_with(insert_call(graph, _ATEN.transpose.int, (split, 1, 2)))
        self.count += 1
        for cache, new in ((keys, new_keys), (values, new_values)):
            # What only repeats the cache dies with the attention; it comes earlier in the graph and must not see the new node.
            cache.node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in cache.repeat)  # noqa: B023 (called here)
        return None

    @staticmethod
    def _may_replace(cache: _Cache, sdpa: fx.Node) -> bool:
        """Readers of the cache other than this attention must come after it, because its new value does."""
        chain = {*cache.repeat, sdpa}
        other_users = [user for node in cache.repeat for user in node.users if user not in chain]
        return not other_users and all(user in chain or sdpa < user for user in cache.node.users)


def _repeats_heads(repeat: list[fx.Node], cache: fx.Node) -> bool:
    """``reshape(expand(unsqueeze(cache, 2)))``: each cached head is used by a run of query heads, in order."""
    names = [node.target._schema.name.split("::")[1] for node in repeat]  # type: ignore[union-attr]
    shape, result = dimensions(cache), dimensions(repeat[0])
    if names == ["repeat_interleave"]:
        dim = schema_arguments(repeat[0]).get("dim")
        return dim == 1 and result[1] % shape[1] == 0
    names = [name for name in names if name != "clone"]
    if names != ["reshape", "expand", "unsqueeze"] or schema_arguments(repeat[-1])["dim"] not in (2, -3):
        return False
    expand = next(node for node in repeat if is_op(node, "aten::expand"))
    wide = dimensions(expand)
    return (
        len(result) == 4
        and isinstance(wide[2], int)
        and result[1] == wide[1] * wide[2]
        and wide[1] == shape[1]
        and all(same_dimension(a, b) for a, b in zip(wide[3:], shape[2:], strict=True))
        and all(same_dimension(a, b) for a, b in zip(result[2:], shape[2:], strict=True))
    )


def _flattened(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``[B, heads, S, D]`` as ``[B, S, heads * D]``, undoing the model's own transpose and reshape when they are there."""
    swapped = is_op(node, "aten::transpose") and tuple(node.args[1:3]) in ((1, 2), (2, 1))
    swapped = swapped or (is_op(node, "aten::permute") and schema_arguments(node)["dims"] == [0, 2, 1, 3])
    rows = node_argument(node) if swapped else insert_call(graph, _ATEN.transpose.int, (node, 1, 2))
    shape = dimensions(rows)
    if is_op(rows, "aten::reshape"):
        flat = node_argument(rows)
        source = dimensions(flat)
        if (
            len(source) == 3
            and source[2] == shape[2] * shape[3]
            and all(same_dimension(a, b) for a, b in zip(source[:2], shape[:2], strict=True))
        ):
            return flat
    return insert_call(graph, _ATEN.flatten.using_ints, (rows, 2, 3))


def _merged_output(sdpa: fx.Node) -> fx.Node | None:
    """The node that holds the output as ``[B, S, heads * D]`` when nothing else reads the attention."""
    if len(sdpa.users) != 1:
        return None
    swapped = next(iter(sdpa.users))
    if not is_op(swapped, "aten::transpose") or tuple(swapped.args[1:3]) not in ((1, 2), (2, 1)):
        return None
    readers = list(swapped.users)
    rows = dimensions(swapped)
    if len(readers) != 1 or not is_op(readers[0], "aten::reshape"):
        return None
    merged = dimensions(readers[0])
    if len(merged) != 3 or not all(same_dimension(a, b) for a, b in zip(merged[:2], rows[:2], strict=True)):
        return None
    return readers[0]
