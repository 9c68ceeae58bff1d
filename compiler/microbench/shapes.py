"""The GEMMs of a model: sizes of its linear layers, and how many rows a workload multiplies with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import sympy
from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.gemms import LAYERS, multiplies
from compile_sparse.compiler.ir.linears import Linear, find_linears
from compile_sparse.compiler.ir.nodes import qualified_name
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.sizes import Size, shape_of
from compile_sparse.compiler.targets.workload import Workload

__all__ = ["ProductShape", "product_shapes"]

Regime = Literal["decode", "prompt", "forward"]
_MOVING = frozenset(
    {"transpose", "t", "permute", "reshape", "unsqueeze", "squeeze", "index", "select", "contiguous", "to"}
)


@dataclass(frozen=True)
class ProductShape:
    """``[rows, inner] @ [outer, inner].T``, as often as the model has it.

    Attributes:
        rows: M, activations multiplied at once.
        inner: K, the contraction.
        outer: N, output features.
        regime: one token per request (decode), whole prompts (prompt), or samples of a model without a cache (forward).
        layers: GEMMs of this size.
        example: stored name of one of their weights.
    """

    rows: int
    inner: int
    outer: int
    regime: Regime
    layers: int
    example: str


def product_shapes(program: Program, workload: Workload) -> tuple[list[ProductShape], list[Diagnostic]]:
    """Every distinct GEMM of the linear layers, the most frequent first, and what is not among them. Reads no weights.

    A decoder is asked for one token of each of ``workload.levels`` requests, and for ``workload.prompt`` tokens of the first
    of these numbers of requests; another model for ``workload.batch`` samples of ``workload.prompt`` tokens.
    """
    linears, diagnostics = find_linears(program)
    found: dict[tuple[int, int, int], ProductShape] = {}
    for linear in linears:
        for regime, batch, tokens in _regimes(program, workload):
            rows = _rows(program, linear, batch, tokens)
            if rows is None:
                diagnostics.append(
                    Diagnostic(
                        linear.tensor, "CS5420", "How many rows it multiplies is not known from batch and prompt."
                    )
                )
                break
            outer, inner = _sizes(program, linear)
            before = found.get((outer, inner, rows))
            if before is None:
                found[outer, inner, rows] = ProductShape(rows, inner, outer, regime, 1, linear.tensor)
            elif before.regime == regime:
                found[outer, inner, rows] = ProductShape(rows, inner, outer, regime, before.layers + 1, before.example)
    ordered = sorted(found.values(), key=lambda shape: (-shape.layers, shape.outer, shape.inner, shape.rows))
    return ordered, [*diagnostics, *_other_products(program)]


def _regimes(program: Program, workload: Workload) -> Iterator[tuple[Regime, int, int]]:
    if program.kind != "decoder":
        yield "forward", workload.batch, workload.prompt
        return
    for level in workload.levels:
        yield "decode", level, 1
    yield "prompt", workload.levels[0], workload.prompt


def _sizes(program: Program, linear: Linear) -> tuple[int, int]:
    shape = program.weights[linear.tensor].shape
    return shape[1 - linear.axis], shape[linear.axis]


def _rows(program: Program, linear: Linear, batch: int, tokens: int) -> int | None:
    """Elements of the input before its last dimension, or None where a dynamic size is neither batch nor tokens."""
    values: dict[sympy.Symbol, int] = {}
    for entry in program.inputs:
        shape = shape_of(program.node(entry.placeholder).meta["val"])
        if entry.role in ("input_ids", "pixel_values", "input_features", "other") and shape:
            values |= dict.fromkeys(_symbols(shape[0]), batch)
        if entry.role == "input_ids":
            values |= dict.fromkeys(_symbols(shape[-1]), tokens)
    sizes = [_number(size, values) for size in shape_of(linear.input.meta["val"])[:-1]]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def _symbols(size: Size) -> set[sympy.Symbol]:
    return set() if isinstance(size, int) else set(size.free_symbols)


def _number(size: Size, values: dict[sympy.Symbol, int]) -> int | None:
    if isinstance(size, int):
        return size
    found = size.subs(values)
    return int(found) if found.is_Integer else None


def _other_products(program: Program) -> list[Diagnostic]:
    """GEMMs with a stored weight that are no linear layers, counted by operator."""
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if not multiplies(node) or qualified_name(node) in LAYERS:
            continue
        if any(_stored(program, operand) for operand in node.all_input_nodes):
            name = op_name(node)
            counts[name] = counts.get(name, 0) + 1
    return [
        Diagnostic(
            name, "CS5421", f"{count} GEMMs of this operator have stored weights; only linear layers are probed."
        )
        for name, count in counts.items()
    ]


def _stored(program: Program, node: fx.Node) -> bool:
    while node.op == "call_function" and op_name(node) in _MOVING and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    tensor = program.tensor_of(node) if node.op == "placeholder" else None
    return tensor is not None and len(program.weights[tensor].shape) >= 2
