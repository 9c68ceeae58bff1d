"""Whether the GEMMs of a finished ONNX file have their N:M zeros where TensorRT's sparse kernels need them.

TensorRT looks for at most N values that are not zero in every M consecutive ones **along the contraction axis** of a constant
that feeds a MatMul, Gemm or Conv. Between constant and GEMM it looks through the operators below and no others: a Reshape,
Concat, Slice or Mul hides the constant (the same rules as Polygraphy's sparsity checker). What earlier passes meant is not
asked here: this reads the file that is handed over. Einsum and ConvTranspose are not covered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_sparse.backends.tensorrt.sparsity.constant_zeros import Constant, is_all_zero
from compile_sparse.compiler.errors import Refusal

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["DENSE", "NO_CONSTANT", "GemmRow", "check_sparsity", "require_pattern"]

DENSE = "dense"
NO_CONSTANT = "no constant"
_MOST_NAMED = 8


@dataclass(frozen=True)
class GemmRow:
    """One GEMM of the graph.

    Attributes:
        node: its name, or its output's when it has none.
        op: MatMul, Gemm or Conv.
        tensor: name of the constant behind an operand; empty when there is none.
        dtype: of that constant, as ONNX calls it, such as FLOAT16 or INT4.
        shape: of that constant as stored.
        k: elements that are contracted (a Conv's input channels per group).
        n: outputs.
        axis: of the stored constant that is contracted.
        path: operators between constant and GEMM, the constant's side first.
        state: ``2:4`` (the pattern that was asked about), ``dense``, ``K % 4`` when K is not a multiple, or ``no constant``.
        why: what made it dense, or where the search for a constant ended; a sentence or empty.
        remarks: what may still keep it from a sparse kernel, or slow it, as sentences.
    """

    node: str
    op: str
    tensor: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    k: int = 0
    n: int = 0
    axis: int = 0
    path: tuple[str, ...] = ()
    state: str = NO_CONSTANT
    why: str = ""
    remarks: tuple[str, ...] = ()


def check_sparsity(onnx_path: Path, *, n: int = 2, m: int = 4) -> list[GemmRow]:
    """Every MatMul, Gemm and Conv of the file, nested graphs included, with the state of its weight.

    Args:
        onnx_path: the file; external data lies beside it and is read in pieces, one tensor at a time.
        n: values of a group that may be other than zero.
        m: consecutive values in a group, 2 to 255.

    Returns:
        One row per GEMM, in file order.

    Raises:
        Refusal: CS4502 when a weight's data is missing, short or outside the folder.
    """
    import onnx

    if not 0 < n < m <= 255:
        raise ValueError(f"{n}:{m} is not a pattern")
    model = onnx.load(str(onnx_path), load_external_data=False)
    return list(_rows(model.graph, _Scope(onnx_path.parent), n, m))


class _Scope:
    """What a name stands for in a graph: a constant, or the output of a node; else what it stands for around the graph."""

    def __init__(self, folder: Path, outer: _Scope | None = None) -> None:
        self.folder = folder
        self.constants: dict[str, Constant] = dict(outer.constants) if outer else {}
        self.producers: dict[str, NodeProto] = dict(outer.producers) if outer else {}

    def enter(self, graph: GraphProto) -> _Scope:
        inner = _Scope(self.folder, self)
        for value in graph.input:
            inner.constants.pop(value.name, None)
            inner.producers.pop(value.name, None)
        for tensor in graph.initializer:
            inner.constants[tensor.name] = Constant(tensor, self.folder)
            inner.producers.pop(tensor.name, None)
        for node in graph.node:
            value = _attribute(node, "value") if node.op_type == "Constant" else None
            for output in node.output:
                inner.constants.pop(output, None)
                inner.producers[output] = node
                if value is not None:
                    inner.constants[output] = Constant(value.t, self.folder)
        return inner


def _rows(graph: GraphProto, outer: _Scope, n: int, m: int) -> Iterator[GemmRow]:
    scope = outer.enter(graph)
    for node in graph.node:
        for attribute in node.attribute:
            nested = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for subgraph in nested:
                yield from _rows(subgraph, scope, n, m)
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.domain in ("", "ai.onnx"):
            yield _row(node, scope, n, m)


@dataclass(frozen=True)
class _Found:
    """A constant behind an operand, with the axes of the operand followed back to it."""

    name: str
    constant: Constant
    contracted: int
    outputs: int
    path: tuple[str, ...]
    zero_moved: str


def _row(node: NodeProto, scope: _Scope, n: int, m: int) -> GemmRow:
    name = node.name or node.output[0]
    found: _Found | None = None
    ends: list[str] = []
    for position, contracted, outputs in _operands(node):
        if position >= len(node.input):
            continue
        traced = _trace(node.input[position], contracted, outputs, scope)
        if isinstance(traced, _Found):
            found = traced
            break
        ends.append(traced)
    if found is None:
        return GemmRow(name, node.op_type, why=ends[0] if ends else "")
    constant, rank = found.constant, len(found.constant.shape)
    axis = found.contracted % rank if rank > 1 else 0
    k = constant.shape[axis] if rank else 1
    outer = constant.shape[found.outputs % rank] if rank > 1 else 1
    state, why = _state(found, axis, k, n, m)
    remarks = _remarks(found, k, outer, constant.dtype)
    return GemmRow(
        name, node.op_type, found.name, constant.dtype, constant.shape, k, outer, axis, found.path, state, why, remarks
    )


def _operands(node: NodeProto) -> list[tuple[int, int, int]]:
    """(input, axis that is contracted, axis of the outputs) of each operand, the usual place of a weight first."""
    if node.op_type == "Conv":
        return [(1, 1, 0)]
    if node.op_type == "Gemm":
        right = (1, 1, 0) if _flag(node, "transB") else (1, 0, 1)
        left = (0, 0, 1) if _flag(node, "transA") else (0, 1, 0)
        return [right, left]
    return [(1, -2, -1), (0, -1, -2)]


def _trace(name: str, contracted: int, outputs: int, scope: _Scope) -> _Found | str:
    """The constant behind ``name``, or a sentence that says where the search ended."""
    path: list[str] = []
    zero_moved = ""
    while True:
        constant = scope.constants.get(name)
        if constant is not None:
            return _Found(name, constant, contracted, outputs, tuple(reversed(path)), zero_moved)
        node = scope.producers.get(name)
        if node is None:
            return f"{name!r} is an input of the graph, or stored in a form that is not read."
        if node.op_type == "Transpose":
            order = _attribute(node, "perm")
            # Without an order all axes are reversed; counted from the other end, an axis keeps its number.
            contracted = order.ints[contracted] if order else -1 - contracted
            outputs = order.ints[outputs] if order else -1 - outputs
        elif node.op_type.endswith(("QuantizeLinear", "DequantizeLinear")):
            zero_moved = zero_moved or _zero_point(node, scope)
        elif node.op_type not in ("Identity", "Cast"):
            return f"{node.op_type} {node.name or node.output[0]!r} stands before it."
        path.append(node.op_type)
        name = node.input[0]


def _zero_point(node: NodeProto, scope: _Scope) -> str:
    """Why a zero may not stay zero in a node that quantizes or dequantizes; empty when it does."""
    if len(node.input) < 3 or not node.input[2]:
        return ""
    traced = _trace(node.input[2], 0, 0, scope)
    if isinstance(traced, str):
        return f"The zero point of {node.name or node.op_type!r} is not a constant."
    if is_all_zero(traced.constant):
        return ""
    return f"{node.name or node.op_type!r} has a zero point other than 0, so stored zeros are not zeros."


def _state(found: _Found, axis: int, k: int, n: int, m: int) -> tuple[str, str]:
    if k % m:
        return f"K % {m}", f"K = {k:,} is not a multiple of {m}."
    if found.zero_moved:
        return DENSE, found.zero_moved
    if not found.constant.readable:
        return DENSE, f"Zeros of {found.constant.dtype} are not read."
    groups = found.constant.groups(axis, n, m)
    if groups.broken:
        share = (
            f"{groups.broken:,} of {groups.total:,} groups of {m} along K have more than {n} values that are not zero."
        )
        return DENSE, share
    return f"{n}:{m}", ""


def _remarks(found: _Found, k: int, n: int, dtype: str) -> tuple[str, ...]:
    remarks = []
    if k % 32:
        remarks.append(f"K = {k:,} is not a multiple of 32.")
    if n % 8:
        remarks.append(f"N = {n:,} is not a multiple of 8.")
    if "Transpose" in found.path:
        remarks.append("A Transpose stands between weight and GEMM; TensorRT keeps it as a layer.")
    if dtype in ("INT4", "UINT4", "FLOAT4E2M1"):
        remarks.append("No sparse kernel for 4-bit weights is known.")
    return tuple(remarks)


def require_pattern(rows: Sequence[GemmRow], intended: Mapping[str, str], *, pattern: str = "2:4") -> None:
    """Insist that what was meant to be sparse is, in the file.

    Products that have the pattern without being meant to are no failure.

    Args:
        rows: of ``check_sparsity``, with the same pattern.
        intended: name of the GEMM's node -> name of its constant; an empty name accepts any.
        pattern: ``N:M``.

    Raises:
        Refusal: CS4501 with every node that is absent, has another weight, or lacks the pattern, and why.
    """
    by_node: dict[str, list[GemmRow]] = {}
    for row in rows:
        by_node.setdefault(row.node, []).append(row)
    wrong = []
    for node, tensor in intended.items():
        faults = [_fault(row, tensor, pattern) for row in by_node.get(node, ())] or ["the file has no such GEMM"]
        wrong += [f"{node}: {fault}" for fault in faults if fault][:1]
    if not wrong:
        return
    more = f"; and {len(wrong) - _MOST_NAMED:,} more" if len(wrong) > _MOST_NAMED else ""
    raise Refusal(
        "CS4501",
        f"{len(wrong):,} of {len(intended):,} GEMMs that were made {pattern} are not {pattern} in the ONNX file.",
        where=wrong[0].split(": ", 1)[0],
        why="; ".join(wrong[:_MOST_NAMED]) + more,
        hint="TensorRT finds the zeros along K of a constant that feeds the GEMM directly, or through Q/DQ, Cast or "
        "Transpose. A pass that moves weights after the zeros were made must keep them.",
    )


def _fault(row: GemmRow, tensor: str, pattern: str) -> str:
    if tensor and row.tensor and row.tensor != tensor:
        return f"its weight is {row.tensor!r}, not {tensor!r}"
    if row.state == pattern:
        return ""
    through = f", through {', '.join(row.path)}" if row.path else ""
    return f"{row.state}{through}. {row.why}".rstrip(". ")


def _attribute(node: NodeProto, name: str) -> Any:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _flag(node: NodeProto, name: str) -> bool:
    attribute = _attribute(node, name)
    return bool(attribute and attribute.i)
