"""Quantized weights as one tensor each: what a program means, and what a checkpoint stores."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.edit import add_weight, eliminate_dead_code, op_name, schema_arguments
from compile_sparse.compiler.ir.float_activations import with_float_activations
from compile_sparse.compiler.ir.gemms import gemm_of
from compile_sparse.compiler.ir.ops.quantization import NVFP4_GROUP, WEIGHT_DEQUANTIZERS
from compile_sparse.compiler.ir.program import CODES, Binding, Program
from compile_sparse.compiler.ir.quantization_schemes import ActivationFormat, Scheme, WeightFormat
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.weights import AbsentTensor, TensorSource

__all__ = ["dequantized"]


def dequantized(program: Program) -> tuple[Program, dict[str, QuantizedTensor]]:
    """The program without quantize and dequantize nodes, its quantized weights as ``QuantizedTensor``; those by tensor name.

    Raises:
        Refusal: CS4304 for codes in a form that no checkpoint format has.
    """
    edited = program.clone()
    weights = [node for node in edited.graph.nodes if op_name(node) in WEIGHT_DEQUANTIZERS]
    # All are read before anything changes: what quantizes an input is shared.
    found = {node: (_tensor(edited, node), _quantized(edited, node)) for node in weights}
    bindings = dict(edited.bindings)
    added: dict[str, TensorSource] = {}
    for node, (tensor, made) in found.items():
        source: TensorSource = made
        if any(isinstance(part, AbsentTensor) for part in made.parts.values()):
            source = AbsentTensor(made.shape, made.dtype, tensor)  # a plan: sizes only
        added[tensor] = source
        plain = add_weight(edited, bindings, f"{node.name}_dequantized", Binding(tensor), source)
        node.replace_all_uses_with(plain)
    result = replace(edited, weights=edited.weights.updated(added), bindings=bindings)
    return with_float_activations(eliminate_dead_code(result)), dict(found.values())


def _tensor(program: Program, node: fx.Node) -> str:
    codes = node.args[0]
    name = program.tensor_of(codes) if isinstance(codes, fx.Node) else None
    if name is None or not name.endswith(CODES):
        raise _strange(node, "its codes are not stored under the name of a weight")
    return name.removesuffix(CODES)


def _quantized(program: Program, node: fx.Node) -> QuantizedTensor:
    given = schema_arguments(node)
    codes: fx.Node = given["q"] if "q" in given else given["codes"]
    shape = tuple(int(size) for size in codes.meta["val"].shape)
    if given.get("axis", 1) != 1:
        raise _strange(node, "its weight is stored transposed, [in, out]")
    parts = {"codes": _stored(program, codes), "scale": _stored(program, given["scale"])}
    name = op_name(node)
    if name == "dequantize_nvfp4":
        parts["global_scale"] = _stored(program, given["global_scale"])
        weights = WeightFormat("fp4", 4, group=NVFP4_GROUP)
    elif name == "dequantize_block":
        weights = WeightFormat("fp8", 8, block=given["block"])
    else:
        floating = codes.meta["val"].dtype.is_floating_point
        zero = given["zero_point"]
        weights = WeightFormat(
            "fp8" if floating else "int", 8 if floating else given["bits"], given["group_size"], symmetric=zero is None
        )
        if zero is not None:
            parts["zero_point"] = _stored(program, zero)
    activations, scale = _activations(node)
    if scale is not None:
        parts["input_scale"] = _stored(program, scale)
    return QuantizedTensor(Scheme(weights, activations), parts, shape)


def _activations(node: fx.Node) -> tuple[ActivationFormat, fx.Node | None]:
    """Format and scale of what the linear layers that read this weight are given."""
    found: dict[tuple[ActivationFormat, fx.Node | None], None] = {}
    for user in node.users:
        gemm = gemm_of(user)
        if gemm is None or not gemm.is_layer or gemm.weight is not node:
            raise _strange(node, f"it is read by {op_name(user)}, which is no linear layer")
        quantizer = op_name(gemm.input)
        given = schema_arguments(gemm.input) if quantizer == "fake_quantize" else {}
        found[given.get("format", ""), given.get("scale")] = None
    if len(found) != 1:
        raise _strange(node, "linear layers that share it quantize their inputs differently")
    return next(iter(found))


def _stored(program: Program, node: fx.Node) -> TensorSource:
    name = program.tensor_of(node)
    if name is None:
        raise _strange(node, "its codes or scales are computed in the graph")
    return program.weights[name]


def _strange(node: fx.Node, why: str) -> Refusal:
    return Refusal(
        "CS4304",
        "A quantized weight cannot be stored in a checkpoint.",
        where=node.name,
        why=f"No checkpoint format has this form: {why}.",
        hint="Quantize with one of the target's schemes, or compile for ort-cpu.",
    )
