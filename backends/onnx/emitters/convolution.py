"""Convolution, its transpose, and the norms that convolutional networks use. The runtime folds batch norm into convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compile_sparse.backends.onnx.dialect import Emitted
from compile_sparse.backends.onnx.element_types import kind_of, raw_values
from compile_sparse.backends.onnx.emission import Emission, Unsupported, emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions

__all__ = ["each"]


def each(values: Any, dims: int) -> list[int]:
    """One number per spatial dimension, as torch lets one stand for all."""
    values = [values] if isinstance(values, int) else list(values)
    return values * dims if len(values) == 1 else values


@emits("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")
def _convolution(emission: Emission, node: fx.Node) -> Emitted:
    given = schema_arguments(node)
    if given.get("transposed"):
        return _transposed(emission, node)
    dims = emission.rank(given["weight"]) - 2
    _require_batch(emission, given["input"], dims)
    dilation = each(given["dilation"], dims)
    pads = _pads(given["padding"], dimensions(given["weight"])[2:], dilation)
    return emission.graph.call(
        "Conv",
        _operands(emission, given),
        hint=node.name,
        strides=each(given["stride"], dims),
        pads=pads,
        dilations=dilation,
        group=given["groups"],
    )


def _pads(padding: Any, kernel: tuple[Any, ...], dilation: list[int]) -> list[int]:
    """Begins, then ends. By name: "valid" is none, "same" keeps the size, an odd element at the end."""
    if not isinstance(padding, str):
        return each(padding, len(kernel)) * 2
    if padding == "valid":
        return [0] * (2 * len(kernel))
    total = [step * (int(size) - 1) for size, step in zip(kernel, dilation, strict=True)]
    return [amount // 2 for amount in total] + [amount - amount // 2 for amount in total]


@emits("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def _transposed(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    dims = emission.rank(given["weight"]) - 2
    _require_batch(emission, given["input"], dims)
    return emission.graph.call(
        "ConvTranspose",
        _operands(emission, given),
        hint=node.name,
        strides=each(given["stride"], dims),
        pads=each(given["padding"], dims) * 2,
        dilations=each(given["dilation"], dims),
        output_padding=each(given["output_padding"], dims),
        group=given["groups"],
    )


def _operands(emission: Emission, given: dict[str, Any]) -> list[str]:
    return [emission.value(given[name]) for name in ("input", "weight", "bias") if given[name] is not None]


def _require_batch(emission: Emission, source: fx.Node, dims: int) -> None:
    if emission.rank(source) != dims + 2:
        raise Unsupported("its input has no batch dimension")


@emits("aten::_native_batch_norm_legit_no_training", "aten::batch_norm")
def _batch_norm(emission: Emission, node: fx.Node) -> Any:
    given = schema_arguments(node)
    if given.get("training") or given["running_mean"] is None:
        raise Unsupported("batch norm with the statistics of the batch")
    name = _stored_statistics(emission, node, given)
    return [name, "", ""] if isinstance(node.meta["val"], (tuple, list)) else name


def _stored_statistics(emission: Emission, node: fx.Node, given: dict[str, Any]) -> str:
    inputs = [emission.value(given["input"]), *_scale_and_shift(emission, given, _channels(given))]
    inputs += [emission.value(given[name]) for name in ("running_mean", "running_var")]
    return emission.graph.call("BatchNormalization", inputs, hint=node.name, epsilon=given["eps"])


@emits("aten::instance_norm")
def _instance_norm(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    if not given["use_input_stats"]:
        return _stored_statistics(emission, node, given)
    inputs = [emission.value(given["input"]), *_scale_and_shift(emission, given, _channels(given))]
    return emission.graph.call("InstanceNormalization", inputs, hint=node.name, epsilon=given["eps"])


@emits("aten::group_norm")
def _group_norm(emission: Emission, node: fx.Node) -> str:
    """Instance norm over groups as if they were channels, then a scale and shift per channel."""
    given = schema_arguments(node)
    source, groups, graph = given["input"], given["num_groups"], emission.graph
    folded = graph.call("Reshape", [emission.value(source), graph.constant([0, groups, -1])])
    plain = [_filled(emission, groups, value, emission.dtype(source)) for value in (1.0, 0.0)]
    normal = graph.call("InstanceNormalization", [folded, *plain], epsilon=given["eps"])
    shape = graph.call("Shape", [emission.value(source)])
    result = graph.call("Reshape", [normal, shape], hint=node.name)
    spread = graph.constant(list(range(1, emission.rank(source) - 1)))
    for op, parameter in (("Mul", given["weight"]), ("Add", given["bias"])):
        if parameter is not None:
            column = graph.call("Unsqueeze", [emission.value(parameter), spread])
            result = graph.call(op, [result, column], hint=node.name)
    return result


def _channels(given: dict[str, Any]) -> int:
    size = dimensions(given["input"])[1]
    if not isinstance(size, int):
        raise Unsupported("a dynamic number of channels")
    return size


def _scale_and_shift(emission: Emission, given: dict[str, Any], size: int) -> list[str]:
    return [
        _filled(emission, size, plain, emission.dtype(given["input"]))
        if given[name] is None
        else emission.value(given[name])
        for name, plain in (("weight", 1.0), ("bias", 0.0))
    ]


def _filled(emission: Emission, size: int, value: float, dtype: torch.dtype) -> str:
    kind, shape = kind_of(dtype), [size]
    name = f"compile_sparse.{value:g}.{size}.{kind}"
    return emission.graph.weight(name, shape, kind, lambda: raw_values(torch.full(shape, value, dtype=dtype)))
