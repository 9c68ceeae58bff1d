"""Sizes of tensors and Python arithmetic on them: int64 tensors of shape ``[1]``."""

from __future__ import annotations

from typing import Any

from torch import fx

from compile_sparse.backends.onnx.emission import Emission, Emitter, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments

__all__: list[str] = []


@emits("aten::sym_size")
def _sym_size(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    return emission.size(given["self"], emission.axis(given["self"], given["dim"]))


def _arithmetic(op: str) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> str:
        return emission.graph.call(op, [_one(emission, a) for a in node.args], hint=node.name)

    return emit


def _one(emission: Emission, operand: Any) -> str:
    if isinstance(operand, float):
        raise Unsupported("arithmetic between a size and a float")
    return emission.integers([operand])


# Sizes are never negative, so integer division and floor division agree.
for _op, _names in {
    "Add": ("python::add",),
    "Sub": ("python::sub",),
    "Mul": ("python::mul",),
    "Div": ("python::floordiv",),
    "Mod": ("python::mod",),
    "Neg": ("python::neg",),
    "Max": ("python::sym_max",),
    "Min": ("python::sym_min",),
}.items():
    emits(*_names)(_arithmetic(_op))


@emits("python::getitem")
def _getitem(emission: Emission, node: fx.Node) -> str:
    source, index = node.args
    names = emission.names(source)  # type: ignore[arg-type]
    if isinstance(names, str) or not isinstance(index, int):
        raise Unsupported("indexing something that is not a list of results")
    return names[index]


@emits("aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::_assert_async", lazy=True)
def _assertion(emission: Emission, node: fx.Node) -> str:
    """Never asked for, because assertions have no value; registered so that they are no unknown operators."""
    raise Unsupported("the value of an assertion")
