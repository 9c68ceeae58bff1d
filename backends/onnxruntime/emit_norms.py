"""RMS norm, and both norms with the residual addition before them."""

from __future__ import annotations

from torch import fx

from compile_sparse.backends.onnx.dialect import Emitted
from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.emitters.norms import gain_of, layer_norm
from compile_sparse.backends.onnxruntime.dialect import MICROSOFT, emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions, is_op, same_dimension

__all__: list[str] = []


@emits("compile_sparse::rms_norm")
def _rms_norm(emission: Emission, node: fx.Node) -> str:
    given = schema_arguments(node)
    emission.count("SimplifiedLayerNormalization")
    inputs = [emission.value(given["x"]), emission.value(given["weight"])]
    return emission.graph.call(
        "SimplifiedLayerNormalization", inputs, hint=node.name, axis=-1, epsilon=given["eps"], stash_type=1
    )


@emits("compile_sparse::residual_rms_norm")
def _residual_rms_norm(emission: Emission, node: fx.Node) -> list[str]:
    given = schema_arguments(node)
    emission.count("SkipSimplifiedLayerNormalization")
    names = emission.graph.call_many(
        "SkipSimplifiedLayerNormalization",
        [emission.value(given[name]) for name in ("x", "residual", "weight")],
        (True, False, False, True),
        hint=node.name,
        domain=MICROSOFT,
        epsilon=given["eps"],
    )
    return [names[0], names[3]]


@emits("aten::layer_norm")
def _layer_norm(emission: Emission, node: fx.Node) -> Emitted:
    return _with_residual(emission, node) or layer_norm(emission, node)


def _with_residual(emission: Emission, node: fx.Node) -> str | None:
    """``layer_norm(x + r)``: one kernel gives the norm and the sum. The sum's own node then has no reader left and is dropped.

    Only a sum that no earlier node read may be taken over, because its new producer stands here.
    """
    given = schema_arguments(node)
    total = given["input"]
    if len(given["normalized_shape"]) != 1 or given["bias"] is None or not _is_plain_sum(total):
        return None
    if any(user < node for user in total.users):
        return None
    shape = list(given["normalized_shape"])
    if not isinstance(shape[0], int):
        return None
    gain = gain_of(emission, given["weight"], shape, emission.dtype(node))
    left, right = (emission.value(argument) for argument in total.args[:2])
    names = emission.graph.call_many(
        "SkipLayerNormalization",
        [left, right, gain, emission.value(given["bias"])],
        (True, False, False, True),
        hint=node.name,
        domain=MICROSOFT,
        epsilon=given["eps"],
    )
    emission.count("SkipLayerNormalization")
    emission.bind(total, names[3])
    return names[0]


def _is_plain_sum(node: fx.Node) -> bool:
    """Same shape on both sides, and three dimensions, which is what the kernel documents."""
    if not is_op(node, "aten::add") or schema_arguments(node)["alpha"] != 1:
        return False
    left, right = node.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return False
    a, b = dimensions(left), dimensions(right)
    return len(a) == len(b) == 3 and all(same_dimension(x, y) for x, y in zip(a, b, strict=True))
