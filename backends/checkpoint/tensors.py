"""The tensors of a program under the names its architecture gives them, counted anew where blocks were removed.

A removed block is a gap in the numbers of its siblings: ``model.layers.0``, ``model.layers.2``. Whatever is numbered without gaps
in the architecture (children of a ``ModuleList``) is renumbered by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.program import CODES, Program
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["Stack", "Tensors", "pattern", "read_tensors", "resizes"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stack:
    """Numbered siblings of which some were removed.

    Attributes:
        prefix: of their names, such as ``model.layers``.
        old: how many there were.
        kept: their old numbers, ascending.
    """

    prefix: str
    old: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint of the program holds.

    Attributes:
        sources: by state-dict name after renumbering; a tied tensor under each of its names.
        before: shapes of the architecture as captured, without removed blocks and under the new numbers. Names without a
            source are tensors of a branch that is left out, or tensors that outputs never depended on.
        stacks: where blocks were removed.
        renamed: stored name in the program -> name here, for every tensor.
    """

    sources: Mapping[str, TensorSource]
    before: Shapes
    stacks: tuple[Stack, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the sources."""
        return {name: tuple(source.shape) for name, source in self.sources.items()}

    @property
    def resized(self) -> set[tuple[int, int]]:
        """Every (old, new) size of a dimension that changed."""
        return resizes(self.before, self.shapes)

    @property
    def left_out(self) -> frozenset[str]:
        """Tensors of branches that the program does not have, although other blocks have theirs."""
        patterns = {pattern(name) for name in self.sources}
        return frozenset(name for name in self.before if name not in self.sources and pattern(name) in patterns)

    @property
    def uneven(self) -> list[str]:
        """Names, with ``#`` for numbers, of tensors that are alike in every block of the architecture and differ now."""
        before, after = _by_pattern(self.before), _by_pattern(self.shapes)
        differ = {name for name, shapes in after.items() if len(shapes) > len(before[name])}
        return sorted(differ | {pattern(name) for name in self.left_out})


def resizes(before: Shapes, after: Shapes) -> set[tuple[int, int]]:
    """Every (old, new) size of a dimension that differs."""
    return {
        (old, new)
        for name, shape in after.items()
        if len(shape) == len(before[name])
        for old, new in zip(before[name], shape, strict=True)
        if old != new
    }


def pattern(name: str) -> str:
    """The name with ``#`` for every number in it."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _by_pattern(shapes: Shapes) -> dict[str, set[tuple[int, ...]]]:
    found: dict[str, set[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found.setdefault(pattern(name), set()).add(shape)
    return found


def read_tensors(program: Program, before: Shapes) -> Tensors:
    """The program's tensors that ``before``, the state dict of its architecture, has a place for.

    Raises:
        Refusal: CS4202 when weights are quantized; CS4203 when a parameter has no place.
    """
    bound = {binding.tensor: binding for binding in program.bindings.values()}
    _refuse_codes(program, bound)
    names = {name: name for name in bound if name in before}
    names |= {alias: name for alias, name in program.aliases.items() if name in bound and alias in before}
    homeless = sorted(name for name, binding in bound.items() if binding.kind == "parameter" and name not in before)
    if homeless:
        raise Refusal(
            "CS4203",
            "The model's class has no place for a tensor of this program.",
            where=homeless[0],
            why="A factorised or otherwise rebuilt layer is not a layer of the class, and a checkpoint stores tensors, "
            "not code." + (f" And {len(homeless) - 1} more." if len(homeless) > 1 else ""),
            hint="Compile for ort-cpu, or leave out the pass that made it.",
        )
    stacks = _gaps(names, before)
    renumbered = {name: str(_renumbered(name, stacks)) for name in names}
    return Tensors(
        sources={renumbered[name]: program.weights[stored] for name, stored in names.items()},
        before={new: shape for name, shape in before.items() if (new := _renumbered(name, stacks)) is not None},
        stacks=tuple(stacks),
        renamed={stored: renumbered[name] for name, stored in names.items()},
    )


def _refuse_codes(program: Program, bound: Iterable[str]) -> None:
    quantized = next((name for name in bound if name.endswith(CODES)), None)
    quantized = quantized or next((n.name for n in program.graph.nodes if "dequantize" in op_name(n)), None)
    if quantized:
        raise Refusal(
            "CS4202",
            "A plain Hugging Face folder does not hold quantized weights.",
            where=quantized.removesuffix(CODES),
            why="transformers would read integer codes as weights.",
            hint="Leave --quantize out, or compile for ort-cpu.",
        )


def _children(names: Iterable[str]) -> dict[str, set[int]]:
    """Numbers used right after each prefix."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                found.setdefault(".".join(parts[:place]), set()).add(int(part))
    return found


def _gaps(present: Iterable[str], before: Iterable[str]) -> list[Stack]:
    now = _children(present)
    return [
        Stack(prefix, len(old), tuple(sorted(now[prefix])))
        for prefix, old in _children(before).items()
        if old == set(range(len(old))) and prefix in now and now[prefix] != old
    ]


def _renumbered(name: str, stacks: Iterable[Stack]) -> str | None:
    """The name by position among what is left; None inside a removed block."""
    by_prefix = {stack.prefix: stack for stack in stacks}
    old = name.split(".")
    new = list(old)
    for place, part in enumerate(old):
        stack = by_prefix.get(".".join(old[:place])) if part.isdigit() else None
        if stack is not None:
            if int(part) not in stack.kept:
                return None
            new[place] = str(stack.kept.index(int(part)))
    return ".".join(new)
