"""Activations."""

from __future__ import annotations

from typing import Any

from torch import fx

from compile_sparse.backends.onnx.emission import Emission, Emitter, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments

__all__: list[str] = []


def _direct(op: str) -> Emitter:
    def emit(emission: Emission, node: fx.Node) -> str:
        return emission.graph.call(op, [emission.value(node.args[0])], hint=node.name)  # type: ignore[arg-type]

    return emit


for _op, _names in {
    "Relu": ("aten::relu",),
    "Tanh": ("aten::tanh",),
    "Sigmoid": ("aten::sigmoid",),
    "HardSwish": ("aten::hardswish",),
    "Mish": ("aten::mish",),
    "Selu": ("aten::selu",),
    "Softsign": ("aten::softsign",),
}.items():
    emits(*_names)(_direct(_op))


@emits("aten::silu")
def _silu(emission: Emission, node: fx.Node) -> str:
    x = emission.value(node.args[0])  # type: ignore[arg-type]
    return emission.graph.call("Mul", [x, emission.graph.call("Sigmoid", [x])], hint=node.name)


@emits("aten::gelu")
def _gelu(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    return emission.graph.call(
        "Gelu", [emission.value(given["self"])], hint=node.name, approximate=given["approximate"] or "none"
    )


@emits("aten::relu6")
def _relu6(emission: Emission, node: fx.Node) -> str:
    return _clip(emission, node, 0, 6)


@emits("aten::hardtanh")
def _hardtanh(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    return _clip(emission, node, given["min_val"], given["max_val"])


def _clip(emission: Emission, node: fx.Node, low: Any, high: Any) -> str:
    dtype = emission.dtype(node)
    inputs = [emission.tensor(node.args[0], dtype), emission.tensor(low, dtype), emission.tensor(high, dtype)]
    return emission.graph.call("Clip", inputs, hint=node.name)


@emits("aten::leaky_relu")
def _leaky_relu(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    slope = float(given["negative_slope"])
    return emission.graph.call("LeakyRelu", [emission.value(given["self"])], hint=node.name, alpha=slope)


@emits("aten::elu")
def _elu(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    if given["scale"] != 1 or given["input_scale"] != 1:
        raise Unsupported("a scaled ELU")
    return emission.graph.call("Elu", [emission.value(given["self"])], hint=node.name, alpha=float(given["alpha"]))


@emits("aten::hardsigmoid")
def _hardsigmoid(emission: Emission, node: fx.Node) -> str:
    x = emission.value(node.args[0])  # type: ignore[arg-type]
    return emission.graph.call("HardSigmoid", [x], hint=node.name, alpha=1 / 6, beta=0.5)


@emits("aten::softplus")
def _softplus(emission: Emission, node: fx.Node) -> str:
    """Above torch's threshold of 20 its identity and the formula differ by less than float32 resolves."""
    given = schema_arguments(node)
    if given["beta"] != 1 or given["threshold"] < 20:
        raise Unsupported("softplus with a beta or a low threshold")
    return emission.graph.call("Softplus", [emission.value(given["self"])], hint=node.name)


@emits("aten::prelu")
def _prelu(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    slope, rank = emission.value(given["weight"]), emission.rank(given["self"])
    if rank > 2:  # a slope per channel stands at dimension 1
        slope = emission.graph.call("Unsqueeze", [slope, emission.graph.constant(list(range(1, rank - 1)))])
    return emission.graph.call("PRelu", [emission.value(given["self"]), slope], hint=node.name)


@emits("aten::glu")
def _glu(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    source = given["self"]
    axis = emission.axis(source, given["dim"])
    first, second = emission.graph.call_many("Split", [emission.value(source)], 2, axis=axis, num_outputs=2)
    return emission.graph.call("Mul", [first, emission.graph.call("Sigmoid", [second])], hint=node.name)
