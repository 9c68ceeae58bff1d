"""Layer norm and RMS norm. Both compute in float32 inside (``stash_type``), whatever the type of their operands."""

from __future__ import annotations

import torch
from torch import fx

from compile_sparse.backends.onnx.element_types import kind_of, raw_values
from compile_sparse.backends.onnx.emission import Emission, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments

__all__ = ["gain_of", "layer_norm"]


@emits("aten::layer_norm")
def layer_norm(emission: Emission, node: fx.Node) -> str:
    """``LayerNormalization`` over the last dimensions."""
    given = schema_arguments(node)
    shape = list(given["normalized_shape"])
    if not all(isinstance(size, int) for size in shape):
        raise Unsupported("normalising a dynamic dimension")
    inputs = [emission.value(given["input"]), gain_of(emission, given["weight"], shape, emission.dtype(node))]
    if given["bias"] is not None:
        inputs.append(emission.value(given["bias"]))
    emission.count("LayerNormalization")
    return emission.graph.call("LayerNormalization", inputs, hint=node.name, axis=-len(shape), epsilon=given["eps"])


def gain_of(emission: Emission, weight: fx.Node | None, shape: list[int], dtype: torch.dtype) -> str:
    """The norm's weight, or ones where it has none."""
    if weight is not None:
        return emission.value(weight)
    name = "compile_sparse.ones." + "x".join(map(str, shape))
    return emission.graph.weight(name, shape, kind_of(dtype), lambda: raw_values(torch.ones(shape, dtype=dtype)))


@emits("compile_sparse::rms_norm")
def _rms_norm(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    return _normalized(emission, node, emission.value(given["x"]))


@emits("compile_sparse::residual_rms_norm")
def _residual_rms_norm(emission: Emission, node: fx.Node) -> list[str]:
    given = schema_arguments(node)
    total = emission.graph.call("Add", [emission.value(given["x"]), emission.value(given["residual"])], hint=node.name)
    return [_normalized(emission, node, total), total]


def _normalized(emission: Emission, node: fx.Node, x: str) -> str:
    given = schema_arguments(node)
    emission.count("RMSNormalization")
    inputs = [x, emission.value(given["weight"])]
    return emission.graph.call("RMSNormalization", inputs, hint=node.name, axis=-1, epsilon=given["eps"])
