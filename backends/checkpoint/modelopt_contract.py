"""Which programs a ModelOpt checkpoint says exactly, and in which of its formats. Needs no weights.

Sources: ModelOpt 0.47 ``torch/export``; TensorRT-LLM ``_torch/modules/linear.py`` (2026); vLLM 0.32 ``quantization/modelopt.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from compile_sparse.backends.checkpoint.modelopt_layout import GROUP_SIZES, Algorithm
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.gemms import gemm_of
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.ops.quantization import WEIGHT_DEQUANTIZERS
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import Scheme
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor

__all__ = ["algorithm_of", "joined", "require_expressible"]


def require_expressible(program: Program) -> None:
    """Check what a checkpoint cannot say at all, whatever the format of its weights.

    Raises:
        Refusal: CS4601 when it is no decoder; CS4603 when values are quantized that are no inputs of linear layers with
            quantized weights.
    """
    if program.kind != "decoder":
        raise Refusal(
            "CS4601",
            "TensorRT-LLM does not load this kind of model.",
            where="MODEL",
            why=f"It is of kind {program.kind!r}, and this checkpoint is for runtimes that generate text.",
            hint="Serve the engine, or compile for hf.",
        )
    for node in program.graph.nodes:
        if op_name(node) != "fake_quantize":
            continue
        other = next((user for user in node.users if not _reads_as_input(user, node)), None)
        if other is None:
            continue
        cached = op_name(other) == "cat"
        raise Refusal(
            "CS4603",
            "ModelOpt's formats quantize weights of linear layers and their inputs, and nothing else.",
            where=node.name,
            why="Here the key-value cache is quantized, and TensorRT-LLM reads no scales of an FP8 cache."
            if cached
            else f"Here a value is quantized that goes into {op_name(other) or 'the outputs'}, such as the output of a layer.",
            hint="Leave --kv-cache out."
            if cached
            else "Serve the engine, or leave the outputs of layers in floating point.",
        )


def _reads_as_input(user: fx.Node, value: fx.Node) -> bool:
    gemm = gemm_of(user)
    return gemm is not None and gemm.is_layer and gemm.input is value and op_name(gemm.weight) in WEIGHT_DEQUANTIZERS


def joined(view: Program) -> list[list[str]]:
    """Weights of linear layers that readers make one matrix of: those of one module with the same input.

    Query, key and value; gate and up. Every linear layer is in exactly one list.
    """
    found: dict[tuple[str, str], dict[str, None]] = {}
    for linear in find_linears(view)[0]:
        module = ".".join(linear.tensor.split(".")[:-2])
        found.setdefault((linear.input.name, module), {})[linear.tensor] = None
    return [list(names) for names in found.values()]


def algorithm_of(view: Program, quantized: Mapping[str, QuantizedTensor]) -> Algorithm | None:
    """The format of all quantized weights; None when there are none.

    Args:
        view: without quantize nodes.
        quantized: its quantized weights, by tensor name.

    Raises:
        Refusal: CS4602 when no format is exactly the scheme; CS4605 for mixtures; CS4606 for sizes that do not fit.
    """
    schemes = dict.fromkeys(tensor.scheme for tensor in quantized.values())
    if not schemes:
        return None
    if len(schemes) > 1:
        raise _mixed(next(iter(quantized)), f"{len(schemes)} schemes, and this version writes one per checkpoint.")
    for names in joined(view):
        some = [name for name in names if name in quantized]
        if some and len(some) < len(names):
            rest = next(name for name in names if name not in quantized)
            raise _mixed(rest, f"It is not quantized and {some[0]} is; readers make one matrix of both.")
    stacked = next(
        (
            binding.tensor
            for binding in view.bindings.values()
            if binding.kind == "parameter" and len(view.weights[binding.tensor].shape) == 3
        ),
        None,
    )
    if stacked:
        raise _mixed(
            stacked, "Its experts are three-dimensional tensors, which are not quantized; readers expect them to be."
        )
    algorithm = _named(next(iter(schemes)), next(iter(quantized)))
    for name, tensor in quantized.items():
        _require_size(name, tensor, algorithm)
    return algorithm


def _named(scheme: Scheme, where: str) -> Algorithm:
    weights, inputs = scheme.weights, scheme.activations
    plain = weights.symmetric and not weights.block
    if weights.kind == "fp8" and plain and not weights.group:
        if inputs == "fp8-static":
            return "FP8"  # when all channels have one scale, which the writer sees
        if inputs == "fp8":
            return "FP8_PER_CHANNEL_PER_TOKEN"
    if weights.kind == "fp4" and inputs == "fp4":
        return "NVFP4"
    if weights.kind == "int" and plain:
        if weights.bits == 4 and weights.group == GROUP_SIZES["W4A16_AWQ"] and not inputs:
            return "W4A16_AWQ"
        if weights.bits == 8 and not weights.group and inputs == "int8-static":
            return "W8A8_SQ_PER_CHANNEL"
    raise Refusal(
        "CS4602",
        "No format of ModelOpt is exactly this one.",
        where=where,
        why=f"Its weights are {_words(scheme)}.",
        hint="Use --quantize fp8-tensor, fp8, nvfp4 or w4a16, as far as the target has them.",
    )


def _words(scheme: Scheme) -> str:
    weights = scheme.weights
    size = f"in blocks of {weights.block}" if weights.block else f"in groups of {weights.group}"
    spread = size if weights.block or weights.group else "with one scale per channel"
    zero = "" if weights.symmetric else " and zero points"
    inputs = f"inputs {scheme.activations}" if scheme.activations else "inputs in floating point"
    return f"{weights.bits}-bit {weights.kind} {spread}{zero}, {inputs}"


def _require_size(name: str, tensor: QuantizedTensor, algorithm: Algorithm) -> None:
    rows, columns = tensor.shape
    group = GROUP_SIZES.get(algorithm, 1)
    if columns % group:
        raise _size(name, f"Groups of {group} do not divide its {columns} inputs.")
    if algorithm == "W4A16_AWQ" and rows % 2:
        raise _size(name, f"Two outputs share a byte, and it has {rows}.")


def _size(name: str, why: str) -> Refusal:
    return Refusal(
        "CS4606",
        "A quantized weight does not fit ModelOpt's format.",
        where=name,
        why=why,
        hint="Remove another share, or quantize to fp8, whose scales have no groups.",
    )


def _mixed(where: str, why: str) -> Refusal:
    return Refusal(
        "CS4605",
        "This mixture of quantized and other weights is not written.",
        where=where,
        why=why,
        hint="Quantize all linear layers alike, or none.",
    )
