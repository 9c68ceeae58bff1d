"""What a GEMM is: which operators multiply, which arguments are the factors, and which dimension is contracted.

Every other place asks here. Attention is not a GEMM (``scaled_dot_product_attention`` multiplies activations with activations
inside one operator); operators whose factors have no fixed place are named by ``WITHOUT_FORM``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import fake_tensor, qualified_name
from compile_sparse.compiler.ir.sizes import Size, shape_of, total

__all__ = [
    "BATCHED",
    "CONVOLUTIONS",
    "FORMS",
    "LAYERS",
    "TRANSPOSED_CONVOLUTIONS",
    "WITHOUT_FORM",
    "Gemm",
    "GemmForm",
    "gemm_of",
    "is_convolution",
    "multiplies",
]


@dataclass(frozen=True)
class GemmForm:
    """How an operator takes its factors.

    Attributes:
        input, weight: schema names of the two factors; either may hold the weights where the operator is symmetric.
        axis: contraction dimension of ``weight``; negative ones count from the end.
        bias: schema name of what is added to the result; empty when there is none.
    """

    input: str
    weight: str
    axis: int
    bias: str = ""


LAYERS = {
    "aten::linear": GemmForm("input", "weight", -1, "bias"),
    "aten::addmm": GemmForm("mat1", "mat2", -2, "self"),
    "aten::mm": GemmForm("self", "mat2", -2),
    "aten::matmul": GemmForm("self", "other", -2),
}
"""Operators that are a linear layer when their weight is a stored matrix."""
BATCHED = {
    "aten::matmul": LAYERS["aten::matmul"],
    "aten::bmm": GemmForm("self", "mat2", -2),
    "aten::baddbmm": GemmForm("batch1", "batch2", -2, "self"),
}
"""Operators that multiply one matrix of a batch with one of another, as attention written out does."""
_GROUPED = {
    "aten::_grouped_mm": GemmForm("self", "mat2", -2, "bias"),
    "transformers::grouped_mm_fallback": GemmForm("input", "weight", -2),
}
TRANSPOSED_CONVOLUTIONS = {f"aten::conv_transpose{rank}d": GemmForm("input", "weight", 0, "bias") for rank in (1, 2, 3)}
CONVOLUTIONS = {
    **{
        f"aten::{name}": GemmForm("input", "weight", 1, "bias")
        for name in ("conv1d", "conv2d", "conv3d", "convolution")
    },
    **TRANSPOSED_CONVOLUTIONS,
}
FORMS = {**LAYERS, **BATCHED, **_GROUPED, **CONVOLUTIONS}
"""Every operator that multiplies two tensors with fixed places, by qualified name."""
WITHOUT_FORM = frozenset({"aten::einsum", "aten::mv", "aten::addmv", "aten::addbmm", "aten::bilinear"})
"""Operators that multiply matrices in another way: their factors' places depend on an equation, or one is a vector."""


@dataclass(frozen=True)
class Gemm:
    """One GEMM or convolution of two tensors.

    Attributes:
        node: the call.
        operator: its qualified name.
        input, weight: the factors.
        axis: contraction dimension of ``weight``, counted from the front.
        bias: what is added; None when nothing is.
    """

    node: fx.Node
    operator: str
    input: fx.Node
    weight: fx.Node
    axis: int
    bias: fx.Node | None

    @property
    def is_layer(self) -> bool:
        """Whether the operator may be a linear layer."""
        return self.operator in LAYERS

    @property
    def is_transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.operator in CONVOLUTIONS and self.axis == 0

    @property
    def in_features(self) -> Size:
        """K: features, or channels of one group of a convolution, that are summed over."""
        return shape_of(fake_tensor(self.weight))[self.axis]

    @property
    def out_features(self) -> Size:
        """N: features of the result; of a transposed convolution with groups, channels of one group."""
        shape = shape_of(fake_tensor(self.weight))
        if self.operator in CONVOLUTIONS:
            return shape[1 - self.axis]
        return shape[-1] if self.axis == len(shape) - 2 else shape[-2]

    @property
    def kernel(self) -> Size:
        """Positions of a convolution's kernel; 1 for GEMMs."""
        return total(shape_of(fake_tensor(self.weight))[2:] if self.operator in CONVOLUTIONS else [])


def gemm_of(node: fx.Node) -> Gemm | None:
    """The factors of a call in ``FORMS``; None for anything else."""
    operator = qualified_name(node)
    form = FORMS.get(operator)
    if form is None:
        return None
    given = schema_arguments(node)
    source, weight, bias = given[form.input], given[form.weight], given.get(form.bias)
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    axis = 0 if given.get("transposed") else form.axis % fake_tensor(weight).ndim
    return Gemm(node, operator, source, weight, axis, bias if isinstance(bias, fx.Node) else None)


def is_convolution(node: fx.Node) -> bool:
    """Whether ``node`` is a convolution of any kind."""
    return qualified_name(node) in CONVOLUTIONS


def multiplies(node: fx.Node) -> bool:
    """Whether ``node`` multiplies matrices, in a known form or another."""
    operator = qualified_name(node)
    return operator in FORMS or operator in WITHOUT_FORM
