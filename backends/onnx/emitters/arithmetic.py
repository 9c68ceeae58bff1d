"""Element-wise arithmetic, comparisons, logic and casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from compile_sparse.backends.onnx.element_types import element_type
from compile_sparse.backends.onnx.emission import Emission, Emitter, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments

__all__: list[str] = []

_ON_BOOLS = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


def _promoted(emission: Emission, left: Any, right: Any) -> torch.dtype:
    """The type both operands are compared in: torch's rule, in which Python numbers only decide between kinds."""
    tensors = [o for o in (left, right) if isinstance(o, fx.Node) and isinstance(o.meta["val"], torch.Tensor)]
    kinds = [emission.dtype(o) for o in tensors] or [emission.dtype(left), emission.dtype(right)]
    result = kinds[0] if len(kinds) == 1 else torch.promote_types(*kinds)
    if len(tensors) == 1:
        number = emission.dtype(right if tensors[0] is left else left)
        if number.is_floating_point and not result.is_floating_point:
            return torch.float32
        if result == torch.bool and number != torch.bool:
            return torch.int64
    return result


def _binary(op: str) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> str:
        given = schema_arguments(node)
        dtype = emission.dtype(node)
        if given.get("rounding_mode"):
            raise Unsupported(f"rounding mode {given['rounding_mode']}")
        left, right = (emission.tensor(given[name], dtype) for name in ("self", "other"))
        if dtype == torch.bool:
            if op not in _ON_BOOLS:
                raise Unsupported("arithmetic on booleans")
            return emission.graph.call(_ON_BOOLS[op], [left, right], hint=node.name)
        if given.get("alpha", 1) != 1:
            right = emission.graph.call("Mul", [right, emission.tensor(given["alpha"], dtype)])
        return emission.graph.call(op, [left, right], hint=node.name)

    return emit


def _comparison(op: str, negate: bool = False) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> str:
        given = schema_arguments(node)
        dtype = _promoted(emission, given["self"], given["other"])
        operands = [emission.tensor(given[name], dtype) for name in ("self", "other")]
        result = emission.graph.call(op, operands, hint=node.name)
        return emission.graph.call("Not", [result], hint=node.name) if negate else result

    return emit


def _logical(op: str, *, bools_only: bool) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> str:
        given = schema_arguments(node)
        if bools_only and emission.dtype(node) != torch.bool:
            raise Unsupported("bitwise logic on integers")
        operands = [emission.tensor(given[k], torch.bool) for k in ("self", "other") if k in given]
        return emission.graph.call(op, operands, hint=node.name)

    return emit


def _unary(op: str) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> str:
        return emission.graph.call(op, [emission.tensor(node.args[0], emission.dtype(node))], hint=node.name)

    return emit


def _register(table: dict[str, Any], make: Callable[..., Emitter], **options: Any) -> None:
    for op, names in table.items():
        emits(*names)(make(op, **options))


_register(
    {
        "Add": ("aten::add",),
        "Sub": ("aten::sub",),
        "Mul": ("aten::mul",),
        "Div": ("aten::div",),
        "Max": ("aten::maximum",),
        "Min": ("aten::minimum",),
    },
    _binary,
)
_register(
    {
        "Equal": ("aten::eq",),
        "Less": ("aten::lt",),
        "LessOrEqual": ("aten::le",),
        "Greater": ("aten::gt",),
        "GreaterOrEqual": ("aten::ge",),
    },
    _comparison,
)
emits("aten::ne")(_comparison("Equal", negate=True))
_register(
    {
        "And": ("aten::__and__", "aten::bitwise_and"),
        "Or": ("aten::__or__", "aten::bitwise_or"),
        "Not": ("aten::bitwise_not",),
    },
    _logical,
    bools_only=True,
)
_register(
    {"And": ("aten::logical_and",), "Or": ("aten::logical_or",), "Not": ("aten::logical_not",)},
    _logical,
    bools_only=False,
)
_register(
    {
        "Neg": ("aten::neg",),
        "Abs": ("aten::abs",),
        "Sqrt": ("aten::sqrt",),
        "Exp": ("aten::exp",),
        "Log": ("aten::log",),
        "Sin": ("aten::sin",),
        "Cos": ("aten::cos",),
        "Floor": ("aten::floor",),
        "Ceil": ("aten::ceil",),
        "Sign": ("aten::sign",),
        "Erf": ("aten::erf",),
        "Reciprocal": ("aten::reciprocal",),
    },
    _unary,
)


@emits("aten::rsub")
def _rsub(emission: Emission, node: fx.Node) -> str:
    given, dtype = schema_arguments(node), emission.dtype(node)
    if given["alpha"] != 1:
        raise Unsupported("rsub with alpha")
    return emission.graph.call(
        "Sub", [emission.tensor(given["other"], dtype), emission.tensor(given["self"], dtype)], hint=node.name
    )


@emits("aten::rsqrt")
def _rsqrt(emission: Emission, node: fx.Node) -> str:
    root = emission.graph.call("Sqrt", [emission.value(node.args[0])])  # type: ignore[arg-type]
    return emission.graph.call("Reciprocal", [root], hint=node.name)


@emits("aten::pow")
def _pow(emission: Emission, node: fx.Node) -> str:
    base, exponent = node.args[:2]
    dtype = emission.dtype(node)
    x = emission.tensor(base, dtype)
    if exponent == 2:  # exact and much faster than the general power
        return emission.graph.call("Mul", [x, x], hint=node.name)
    return emission.graph.call("Pow", [x, emission.tensor(exponent, dtype)], hint=node.name)


@emits("aten::clamp", "aten::clamp_min", "aten::clamp_max")
def _clamp(emission: Emission, node: fx.Node) -> str:
    given, dtype = schema_arguments(node), emission.dtype(node)
    limits = ["" if given.get(k) is None else emission.tensor(given[k], dtype) for k in ("min", "max")]
    return emission.graph.call("Clip", [emission.tensor(given["self"], dtype), *limits], hint=node.name)


@emits("aten::_to_copy", "aten::to", "aten::type_as")
def _cast(emission: Emission, node: fx.Node) -> str:
    return emission.tensor(node.args[0], emission.dtype(node))


@emits("aten::clone", "aten::contiguous", "aten::alias", "aten::detach", "aten::lift_fresh_copy", "aten::dropout")
def _same(emission: Emission, node: fx.Node) -> str:
    return emission.value(node.args[0])  # type: ignore[arg-type]


@emits("aten::where")
def _where(emission: Emission, node: fx.Node) -> str:
    given, dtype = schema_arguments(node), emission.dtype(node)
    operands = [emission.tensor(given["condition"], torch.bool)]
    operands += [emission.tensor(given[k], dtype) for k in ("self", "other")]
    return emission.graph.call("Where", operands, hint=node.name)


@emits("aten::masked_fill")
def _masked_fill(emission: Emission, node: fx.Node) -> str:
    given, dtype = schema_arguments(node), emission.dtype(node)
    operands = [
        emission.value(given["mask"]),
        emission.tensor(given["value"], dtype),
        emission.tensor(given["self"], dtype),
    ]
    return emission.graph.call("Where", operands, hint=node.name)


@emits("compile_sparse::dequantize_weight", lazy=True)
def _dequantize_weight(emission: Emission, node: fx.Node) -> str:
    """The plain form, for readers that are no linear: ``q * scale`` written out.

    The scales are spread while writing, because a graph would have to build the same thing at every load.
    """
    given = schema_arguments(node)
    if given["zero_point"] is not None or given["q"].meta["val"].dtype != torch.int8:
        raise Unsupported("weight codes with zero points, or in 8-bit floating point")
    q, scale, axis, group = (given[name] for name in ("q", "scale", "axis", "group_size"))
    width = int(q.meta["val"].shape[axis])

    def spread(values: torch.Tensor) -> Any:
        full = values.repeat_interleave(group, dim=1)[:, :width] if group else values[:, None]
        return (full if axis == 1 else full.t()).contiguous().numpy()

    channels = int(q.meta["val"].shape[1 - axis])
    wide = (channels, width if group else 1)
    name = emission.stored(scale, ".spread", wide if axis == 1 else wide[::-1], "float32", spread)
    codes = emission.graph.call("Cast", [emission.value(q)], to=element_type("float32"))
    return emission.graph.call("Mul", [codes, name], hint=node.name)
