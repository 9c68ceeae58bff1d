"""How much arithmetic one token asks of the weights, and how many of their bytes it reads: counted on the graph's shapes.

Only what involves stored weights is counted. Attention over past tokens and the reading of the cache grow with the length of
the text, and are nobody's weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.gemms import WITHOUT_FORM, Gemm, gemm_of
from compile_sparse.compiler.ir.linears import is_lm_head
from compile_sparse.compiler.ir.nodes import fake_tensor, node_argument, qualified_name
from compile_sparse.compiler.ir.ops.quantization import WEIGHT_DEQUANTIZERS
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.sizes import Size, shape_of
from compile_sparse.compiler.ir.storage import bytes_by_tensor

__all__ = ["TokenCost", "token_cost"]

_CHOOSING = frozenset({"embedding", "index", "index_select", "gather", "slice", "select", "narrow"})
MOVING = WEIGHT_DEQUANTIZERS | frozenset(
    {"reshape", "transpose", "t", "permute", "unsqueeze", "squeeze", "alias", "contiguous"}
    | {"to", "_to_copy", "clone", "detach"}
)
"""What is read through them is counted as what they read: the stored form of a weight."""
_READS = MOVING | _CHOOSING


@dataclass(frozen=True)
class TokenCost:
    """What one token costs, or one sample for models whose inputs are not a stream of tokens.

    Attributes:
        flops: stored tensor -> floating-point operations of the GEMMs it is a factor of, two per multiply-add.
        read_bytes: stored tensor -> bytes read, once: the rows looked up of an embedding, the experts chosen, else all.
        head_flops: the part of ``flops`` that is a decoder's lm_head. A prompt needs it at its last token only.
        uncounted: operators with a stored factor whose work this module cannot count.
    """

    flops: Mapping[str, int]
    read_bytes: Mapping[str, int]
    head_flops: int
    uncounted: tuple[str, ...] = ()


def token_cost(program: Program, *, tokens: int = 1) -> TokenCost:
    """Count for a batch of one and ``tokens`` new tokens. Linear in the nodes of the graph; weights are not read."""
    sizes = _Sizes(program, tokens)
    stored = bytes_by_tensor(program)
    flops: dict[str, int] = {}
    head, uncounted = 0, set()
    for node in program.graph.nodes:
        if qualified_name(node) in WITHOUT_FORM and any(_stored(program, operand) for operand in node.all_input_nodes):
            uncounted.add(op_name(node))
        gemm = gemm_of(node)
        tensor = None if gemm is None else _stored(program, gemm.input) or _stored(program, gemm.weight)
        if gemm is None or tensor is None:
            continue
        work = 2 * _multiply_adds(gemm, sizes)
        flops[tensor] = flops.get(tensor, 0) + work
        if program.kind == "decoder" and is_lm_head(program, node):
            head += work
    read: dict[str, int] = {}
    for node in program.graph.nodes:
        tensor = program.tensor_of(node)
        if tensor is not None:
            read[tensor] = read.get(tensor, 0) + _elements_read(node, sizes)
    bytes_read = {
        tensor: math.ceil(stored[tensor] * min(1.0, elements / max(1, program.weights.elements(tensor))))
        for tensor, elements in read.items()
    }
    return TokenCost(flops, bytes_read, head, tuple(sorted(uncounted)))


class _Sizes:
    """Numbers of elements with every dynamic dimension at one, and the token dimension at ``tokens``."""

    def __init__(self, program: Program, tokens: int) -> None:
        self._values: dict[sympy.Symbol, int] = {}
        self._known: dict[sympy.Expr, int] = {}
        ids = [entry.placeholder for entry in program.inputs if entry.role == "input_ids"]
        for node in program.graph.nodes:
            if node.name in ids:
                length = shape_of(node.meta["val"])[-1]
                self._values |= {} if isinstance(length, int) else dict.fromkeys(length.free_symbols, tokens)

    def dimension(self, size: Size) -> int:
        if isinstance(size, int):
            return size
        if size not in self._known:
            self._known[size] = int(size.subs({symbol: self._values.get(symbol, 1) for symbol in size.free_symbols}))
        return self._known[size]

    def elements(self, node: fx.Node) -> int:
        return math.prod(self.dimension(size) for size in shape_of(fake_tensor(node)))


def _stored(program: Program, node: fx.Node) -> str | None:
    """The parameter that a value is, or is a choice from."""
    while node.op == "call_function" and op_name(node) in _READS:
        if op_name(node) == "embedding":  # looked-up rows are activations
            return None
        node = node_argument(node)
    return program.tensor_of(node) if node.op == "placeholder" else None


def _multiply_adds(gemm: Gemm, sizes: _Sizes) -> int:
    """Elements of the result times the length of the sums they are; transposed convolutions are counted from their input."""
    kernel = sizes.dimension(gemm.kernel)
    if gemm.is_transposed:
        return sizes.elements(gemm.input) * sizes.dimension(gemm.out_features) * kernel
    return sizes.elements(gemm.node) * sizes.dimension(gemm.in_features) * kernel


def _elements_read(node: fx.Node, sizes: _Sizes) -> int:
    """Elements of a stored tensor that one evaluation touches, at most all of them per use."""
    total, whole = 0, sizes.elements(node)
    for user in node.users:
        if not isinstance(user.meta.get("val"), (torch.Tensor, tuple, list)):
            continue  # sizes
        first, name, gemm = user.args[0] is node, op_name(user), gemm_of(user)
        if name in _CHOOSING and first:
            total += min(whole, sizes.elements(user))
        elif name in MOVING and first:
            total += _elements_read(user, sizes)
        elif gemm is not None and node in (gemm.input, gemm.weight):
            total += min(whole, _multiply_adds(gemm, sizes))
        else:
            total += whole
    return total
