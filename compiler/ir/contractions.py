"""Find the stored weights that are contracted with activations: in linear layers and in convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.gemms import gemm_of, is_convolution
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program

__all__ = ["Contraction", "find_contractions"]

_Use = tuple[fx.Node, fx.Node, fx.Node, int]
"""The call, its input, its weight's placeholder, the contraction dimension of the weight."""


@dataclass(frozen=True)
class Contraction:
    """A stored weight that only GEMMs or convolutions read, all of them contracting the same dimension.

    Attributes:
        tensor: stored name.
        shape: ``[N, K]`` (linear), ``[K, N]`` (addmm, mm, matmul) or ``[N, K, *kernel]`` (convolution).
        axis: the dimension of size K that is contracted with activations: 1, 0 or 1.
        nodes: the calls, in graph order; several when layers share the weight.
        inputs: the activations of each.
    """

    tensor: str
    shape: tuple[int, ...]
    axis: int
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]

    @property
    def in_features(self) -> int:
        """K: input features or channels."""
        return self.shape[self.axis]

    @property
    def out_features(self) -> int:
        """N: output features or channels."""
        return self.shape[1 - self.axis]

    @property
    def input_dim(self) -> int:
        """The dimension of size K of every input, counted from the end: the last, or the channels before the positions."""
        return 1 - len(self.shape)


def find_contractions(program: Program) -> tuple[list[Contraction], list[Diagnostic]]:
    """Every such weight in graph order, and what looks like one but is left alone."""
    linears, diagnostics = find_linears(program)
    uses: dict[str, list[_Use]] = {}
    for linear in linears:
        uses.setdefault(linear.tensor, []).append((linear.node, linear.input, linear.weight, linear.axis))
    for tensor, use in _convolutions(program, diagnostics):
        uses.setdefault(tensor, []).append(use)
    found = []
    for tensor, each in uses.items():
        nodes, inputs, weights, axes = zip(*each, strict=True)
        if len(set(axes)) > 1 or any(set(weight.users) - set(nodes) for weight in weights):
            why = "Its tensor has another use (a tied embedding)."
            diagnostics.append(Diagnostic(tensor, "CS2204", why))
        else:
            found.append(Contraction(tensor, program.weights[tensor].shape, axes[0], nodes, inputs))
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    return sorted(found, key=lambda each: place[each.nodes[0]]), diagnostics


def _convolutions(program: Program, diagnostics: list[Diagnostic]) -> Iterator[tuple[str, _Use]]:
    for node in program.graph.nodes:
        gemm = gemm_of(node) if is_convolution(node) else None
        if gemm is None:
            continue
        groups = schema_arguments(node)["groups"]
        tensor = program.tensor_of(gemm.weight)
        if tensor is None or program.bindings[gemm.weight.name].kind != "parameter":
            diagnostics.append(
                Diagnostic(node.name, "CS2202", "Its weight is computed, not stored.", "It stays as it is.")
            )
        elif gemm.is_transposed:
            diagnostics.append(Diagnostic(tensor, "CS2204", "It is a transposed convolution."))
        elif groups != 1:
            why = f"Its channels are convolved in {groups} groups; kernels that skip zeros need one."
            diagnostics.append(Diagnostic(tensor, "CS2204", why))
        else:
            yield tensor, (node, gemm.input, gemm.weight, gemm.axis)
