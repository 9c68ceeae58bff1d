"""Scales of a quantized key-value cache: which attention each belongs to, and the tensors that tell vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.edit import op_name, schema_arguments
from compile_sparse.compiler.ir.gemms import gemm_of
from compile_sparse.compiler.ir.program import CODES, Program
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["CACHE_SCHEME", "cache_scales"]

CACHE_SCHEME: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
_ATTENTION = "self_attn"
_NAMES = {"present_key": "k_scale", "present_value": "v_scale"}


def cache_scales(program: Program) -> dict[tuple[str, str], TensorSource]:
    """``(weight of a projection, k_scale or v_scale) -> scale`` for every quantized cache; empty when none is.

    A scale lies beside the projections of its attention: ``model.layers.0.self_attn.k_scale``. One weight may make both.

    Raises:
        Refusal: CS4304 when only some are quantized (vLLM has one cache format for all layers), or where vLLM would not find
            the scales.
    """
    found: dict[tuple[str, str], TensorSource] = {}
    plain = 0
    for node, output in zip(program.output_nodes, program.outputs, strict=True):
        if output.role not in _NAMES:
            continue
        parts = node.args[0] if op_name(node) == "cat" else ()
        quantizer = parts[1] if isinstance(parts, (list, tuple)) and len(parts) == 2 else None
        if not isinstance(quantizer, fx.Node) or op_name(quantizer) != "fake_quantize":
            plain += 1
            continue
        scale = program.tensor_of(schema_arguments(quantizer)["scale"])
        if scale is None:
            raise RuntimeError(f"the scale of {quantizer.name} is not stored")
        weight = _projection(program, quantizer.args[0])
        found[weight, _NAMES[output.role]] = program.weights[scale]
        attention = weight.rsplit(".", 2)[0]
        if not attention.endswith(f".{_ATTENTION}"):
            raise Refusal(
                "CS4304",
                "vLLM would not read the scales of this model's key-value cache.",
                where=attention,
                why=f"It looks for them in modules called {_ATTENTION}, and this model's attention is called otherwise.",
                hint="Leave --kv-cache out.",
            )
    if found and plain:
        raise Refusal(
            "CS4304",
            "Only a part of the key-value cache is quantized.",
            where="quantize-cache",
            why=f"{plain} of {plain + len(found)} caches are not; vLLM keeps all layers' caches in one format.",
            hint="Leave --kv-cache out.",
        )
    return found


def _projection(program: Program, node: Any) -> str:
    """Name of the weight that a key or value was projected with: the nearest linear layer above."""
    while isinstance(node, fx.Node):
        gemm = gemm_of(node)
        if gemm is not None and gemm.is_layer:
            # Of a quantized weight the codes are stored, and dequantized where they are used.
            stored = gemm.weight.args[0] if gemm.weight.op != "placeholder" else gemm.weight
            name = program.tensor_of(stored) if isinstance(stored, fx.Node) else None
            if name is None:
                break
            return name.removesuffix(CODES)
        node = next((used for used in node.all_input_nodes if used.op == "call_function"), None)
    raise Refusal(
        "CS4304",
        "The scale of a key-value cache has no place in a checkpoint.",
        where="quantize-cache",
        why="What is cached does not come from a linear layer.",
        hint="Leave --kv-cache out.",
    )
