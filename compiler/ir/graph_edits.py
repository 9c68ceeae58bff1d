"""Edits on one graph that add tensors and operators, collected until they are applied together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import fx

from compile_sparse.compiler.ir.edit import add_weight, eliminate_dead_code, fake_mode_of
from compile_sparse.compiler.ir.program import Binding, Program, SparsityMask
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["Edits"]


class Edits:
    """New placeholders and calls in the graph of a program.

    Args:
        program: a clone that may be edited.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._bindings = dict(program.bindings)
        self._added: dict[str, TensorSource] = {}

    def placeholder(
        self, name: str, tensor: str, source: TensorSource, kind: Literal["parameter", "buffer"] = "buffer"
    ) -> fx.Node:
        """A stored tensor called ``tensor`` or, when this graph has got one of that name already, with a number behind it."""
        stored, count = tensor, 1
        while stored in self._added:
            count += 1
            stored = f"{tensor}_{count}"
        self._added[stored] = source
        return add_weight(self.program, self._bindings, name, Binding(stored, kind), source)

    def before(self, place: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A call in front of ``place``."""
        with self.program.graph.inserting_before(place):
            return self._called(target, args)

    def after(self, place: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A call behind ``place``."""
        with self.program.graph.inserting_after(place):
            return self._called(target, args)

    def _called(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """The call, with its value on fake tensors recorded."""
        node = self.program.graph.call_function(target, args)
        given = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        with fake_mode_of(self.program):
            node.meta["val"] = target(*given)
        return node

    def applied(self, masks: Mapping[str, SparsityMask]) -> Program:
        """The program with the new tensors and ``masks`` on top of its own, without what nobody reads any more."""
        program = replace(
            self.program,
            weights=self.program.weights.updated(self._added),
            bindings=self._bindings,
            masks={**self.program.masks, **masks},
        )
        return eliminate_dead_code(program)
