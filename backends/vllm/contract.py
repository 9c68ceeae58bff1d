"""What vLLM can load and run, checked on sizes before anything is written.

Sources: vLLM 0.32's kernels and loaders (``model_executor/kernels/linear``, ``layers/quantization``, ``models/llama.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from compile_sparse.compiler.axes.analysis import analyse
from compile_sparse.compiler.axes.groups import Group
from compile_sparse.compiler.diagnostics import Diagnostic, Severity
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.targets.target import Target

__all__ = ["violations"]

Parts = Mapping[tuple[str, int], int]
"""``(tensor, dimension)`` -> number of parts it is cut into, one on each GPU; absent: not cut."""

_CPU_TILE = 32  # cpu_gemm_wna16 takes in- and out-sizes in multiples of this (kernels/linear/mixed_precision/cpu.py)
_MARLIN_TILES = ((64, 128), (128, 64))  # (outputs, inputs), one pair suffices (quantization/utils/marlin_utils.py)
_CUTLASS = 16  # _custom_ops.cutlass_scaled_mm, and the padding in kernels/linear/scaled_mm/cutlass.py
_CUTLASS_FP4 = 32  # quantization/utils/nvfp4_utils.py
_BLOCK = 128


def violations(
    program: Program, quantized: Mapping[str, QuantizedTensor], target: Target, gpus: int = 1
) -> list[Diagnostic]:
    """CS43xx for what vLLM refuses or would run wrongly, CS23xx for what it runs slowly. Needs no weights.

    Args:
        program: without quantize nodes.
        quantized: its quantized weights, by tensor name.
        target: of this backend.
        gpus: that the model is split over.
    """
    if program.kind != "decoder":
        why = f"This is a model of kind {program.kind!r}; only text generation is measured in vLLM by this version."
        return [Diagnostic("MODEL", "CS4306", why, "Compile it for ort-cpu.", severity="error")]
    groups = analyse(program).groups if gpus > 1 else ()
    parts = _parts(groups, gpus)
    found = [*_experts(program, quantized), *_parallel(program, groups, gpus)]
    for name, tensor in quantized.items():
        found += [Diagnostic(name, *reason, severity="error") for reason in _shape(name, tensor, target, parts, gpus)]
    for names in _joined(program, quantized):
        found += [Diagnostic(names[0], *reason) for reason in _tiles(names, quantized, target, parts, gpus)]
    return _merged(found)


def _experts(program: Program, quantized: Mapping[str, QuantizedTensor]) -> Iterator[Diagnostic]:
    stacked = [
        binding.tensor
        for binding in program.bindings.values()
        if binding.kind == "parameter" and len(program.weights[binding.tensor].shape) == 3
    ]
    if quantized and stacked:
        why = (
            "Its experts are stored as three-dimensional tensors, which are not quantized; vLLM expects every linear layer of "
            "such a model, experts included, in one scheme."
        )
        yield Diagnostic(stacked[0], "CS4307", why, "Leave --quantize out; pruning of experts works.", severity="error")


def _shape(
    name: str, tensor: QuantizedTensor, target: Target, parts: Parts, gpus: int
) -> Iterator[tuple[str, str, str]]:
    """(code, why, hint) per broken rule of one weight."""
    fmt, (rows, columns) = tensor.scheme.weights, tensor.shape
    row_parts, column_parts = parts.get((name, 0), 1), parts.get((name, 1), 1)
    if fmt.group and columns % fmt.group:
        yield (
            "CS4301",
            f"Groups of {fmt.group} do not divide its {columns} inputs ({columns / fmt.group:g} groups), and vLLM has no last "
            "group of another size.",
            f"{_without_groups(target, columns)}, or remove a share that leaves a multiple of {fmt.group}.",
        )
    elif fmt.group and columns % (fmt.group * column_parts):
        yield (
            "CS4301",
            f"Split over {column_parts} GPUs each would hold {columns / column_parts:g} of its {columns} inputs, which are no "
            f"whole groups of {fmt.group}.",
            "A smaller --tensor-parallel, or a scheme with smaller groups.",
        )
    if fmt.block and (rows % _BLOCK or columns % _BLOCK):
        yield (
            "CS4302",
            f"Blocks of {_BLOCK}x{_BLOCK} do not divide its shape {rows}x{columns}.",
            "--quantize fp8, which has one scale per channel.",
        )
    elif fmt.block and (rows % (_BLOCK * row_parts) or columns % (_BLOCK * column_parts)):
        yield (
            "CS4302",
            f"Split over {max(row_parts, column_parts)} GPUs each would hold {rows / row_parts:g}x{columns / column_parts:g} of "
            f"its shape {rows}x{columns}, which are no whole blocks of {_BLOCK}x{_BLOCK}.",
            "A smaller --tensor-parallel, or --quantize fp8, which has one scale per channel.",
        )
    if fmt.kind == "int" and not tensor.scheme.activations:
        per_int = 32 // fmt.bits
        if columns % (per_int * column_parts) or (not fmt.symmetric and rows % (per_int * row_parts)):
            held = f"{rows}x{columns}" + (f", split over {gpus} GPUs" if parts else "")
            yield (
                "CS4303",
                f"{fmt.bits}-bit codes are packed {per_int} to an integer, which does not divide its shape {held}.",
                f"{_unpacked(target)}, or remove a share that leaves a multiple of 32.",
            )


def _without_groups(target: Target, columns: int) -> str:
    """Schemes of the target that fit a number of inputs, as an option."""

    def fits(name: str) -> bool:
        scheme = SCHEMES[name]
        tile = _CPU_TILE if target.device == "cpu" and not scheme.activations else 1
        return name in target.schemes and columns % max(scheme.weights.group, tile) == 0

    return f"--quantize {' or '.join(filter(fits, ('w4a16-g32', 'w4a16-channel', 'w8a8', 'fp8')))}"


def _unpacked(target: Target) -> str:
    return f"--quantize {next(name for name in ('w8a8', 'fp8') if name in target.schemes)}"


def _joined(program: Program, quantized: Mapping[str, QuantizedTensor]) -> list[list[str]]:
    """Quantized weights that vLLM fuses: those of one module with the same input (query, key and value; gate and up)."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for linear in find_linears(program)[0]:
        if linear.tensor in quantized:
            module = ".".join(linear.tensor.split(".")[:-2])
            found.setdefault((linear.input.name, module), {})[linear.tensor] = None
    return [list(names) for names in found.values()]


def _tiles(
    names: Sequence[str], quantized: Mapping[str, QuantizedTensor], target: Target, parts: Parts, gpus: int
) -> Iterator[tuple[str, str, str, Severity]]:
    """(code, why, hint, severity) where sizes of what one kernel gets are not those it was written for."""
    scheme = quantized[names[0]].scheme
    rows = sum(quantized[name].shape[0] // parts.get((name, 0), 1) for name in names)
    columns = quantized[names[0]].shape[1] // parts.get((names[0], 1), 1)
    held = f"{rows}x{columns}" + (f" ({len(names)} joined)" if len(names) > 1 else "")
    held += f" on each of {gpus} GPUs" if parts else ""
    packed = scheme.weights.kind == "int" and not scheme.activations
    if target.device == "cpu":
        if packed and (rows % _CPU_TILE or columns % _CPU_TILE):
            yield (
                "CS4303",
                f"vLLM's CPU kernel for weight-only codes takes sizes in multiples of {_CPU_TILE}; this layer is {held}.",
                f"{_unpacked(target)}, or remove a share that leaves a multiple of {_CPU_TILE}.",
                "error",
            )
        return
    if packed:
        if not any(rows % outputs == 0 and columns % inputs == 0 for outputs, inputs in _MARLIN_TILES):
            yield (
                "CS2331",
                "vLLM's weight-only kernel (Marlin) takes outputs and inputs in multiples of 64 and 128, or of 128 and 64; "
                f"this layer is {held}, so it is padded with zeros, and its activations on every call.",
                "",
                "warning",
            )
    elif scheme.activations.startswith("int8"):
        if rows % _CUTLASS or columns % _CUTLASS:
            yield (
                "CS2331",
                f"vLLM's int8 kernel (CUTLASS) takes sizes in multiples of {_CUTLASS}; this layer is {held}, so another one "
                "(Triton) is used.",
                "",
                "warning",
            )
    else:
        tile = _CUTLASS_FP4 if scheme.weights.kind == "fp4" else _CUTLASS
        if rows % tile or columns % tile:
            yield (
                "CS2331",
                f"vLLM's {scheme.weights.kind} kernel (CUTLASS) takes sizes in multiples of {tile}; this layer is {held}, so "
                "it is padded with zeros, and its activations on every call.",
                "",
                "warning",
            )


def _parts(groups: Sequence[Group], gpus: int) -> Parts:
    """What tensor parallelism cuts: channels and heads, not the width. Fewer key-value heads than GPUs are repeated whole."""
    sizes: dict[tuple[str, int], int] = {}
    for group in groups:
        for place in group.members if group.kind in ("channels", "heads") else ():
            sizes[place] = sizes.get(place, 1) * group.size
    return {place: min(gpus, size) for place, size in sizes.items()}


def _parallel(program: Program, groups: Sequence[Group], gpus: int) -> Iterator[Diagnostic]:
    """Tensor parallelism splits heads and channels; what a GPU holds must be whole."""
    if gpus == 1:
        return
    key_heads = {
        int(program.node(entry.placeholder).meta["val"].shape[1])
        for entry in program.inputs
        if entry.role == "past_key"
    }
    fewer = "Remove another share, or use fewer GPUs."
    for heads in sorted(key_heads):
        if heads % gpus and gpus % heads:
            why = f"{heads} key-value heads can neither be split over {gpus} GPUs nor be repeated evenly on them."
            yield Diagnostic("--tensor-parallel", "CS4308", why, fewer, severity="error")
    declared = int(program.config.get("num_attention_heads") or 0)
    for query in sorted(_query_heads(program)):
        if query % gpus:
            dense = "" if query == declared else f" (of {declared} in the dense model)"
            why = f"{query} query heads{dense} cannot be split over {gpus} GPUs."
            yield Diagnostic("--tensor-parallel", "CS4308", why, fewer, severity="error")
    for group in groups:
        if group.kind == "channels" and group.size % gpus:
            why = f"Its {group.size} channels cannot be split over {gpus} GPUs."
            yield Diagnostic(group.anchor.tensor, "CS4308", why, fewer, severity="error")


def _query_heads(program: Program) -> set[int]:
    """Numbers of query heads, over layers: the second size of attention's query."""
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and "scaled_dot_product_attention" in str(node.target):
            size = node.args[0].meta["val"].shape[1]
            if isinstance(size, int):
                found.add(size)
    return found


def _merged(found: Sequence[Diagnostic]) -> list[Diagnostic]:
    """One entry per reason; how many others share it is said in words."""
    by_reason: dict[tuple[str, str, str], list[Diagnostic]] = {}
    for diagnostic in found:
        by_reason.setdefault((diagnostic.code, diagnostic.why, diagnostic.hint), []).append(diagnostic)
    merged = []
    for same in by_reason.values():
        more = f" And {len(same) - 1} more of this size." if len(same) > 1 else ""
        merged.append(replace(same[0], why=same[0].why + more))
    return merged
