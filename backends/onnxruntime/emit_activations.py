"""Activations and convolution."""

from __future__ import annotations

from typing import Any

from torch import fx

from compile_sparse.backends.onnxruntime.emission import Emission, Emitter, Unsupported, emits
from compile_sparse.compiler.raising.matching import arguments

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
}.items():
    emits(*_names)(_direct(_op))


@emits("aten::silu")
def _silu(emission: Emission, node: fx.Node) -> str:
    x = emission.value(node.args[0])  # type: ignore[arg-type]
    return emission.graph.call("Mul", [x, emission.graph.call("Sigmoid", [x])], hint=node.name)


@emits("aten::gelu")
def _gelu(emission: Emission, node: fx.Node) -> str:
    given = arguments(node)
    return emission.graph.call(
        "Gelu", [emission.value(given["self"])], hint=node.name, approximate=given["approximate"] or "none"
    )


@emits("aten::conv1d", "aten::conv2d", "aten::convolution")
def _convolution(emission: Emission, node: fx.Node) -> str:
    given = arguments(node)
    if given.get("transposed") or isinstance(given["padding"], str):
        raise Unsupported("transposed convolution or padding given by name")
    dims = emission.rank(given["weight"]) - 2
    strides, padding, dilation = (_each(given[name], dims) for name in ("stride", "padding", "dilation"))
    inputs = [emission.value(given[k]) for k in ("input", "weight")]
    if given["bias"] is not None:
        inputs.append(emission.value(given["bias"]))
    return emission.graph.call(
        "Conv",
        inputs,
        hint=node.name,
        strides=strides,
        pads=padding * 2,
        dilations=dilation,
        group=given["groups"],
    )


def _each(values: Any, dims: int) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return values * dims if len(values) == 1 else values
