"""What vLLM can load and run, checked on sizes before anything is written.

Sources: vLLM 0.32's kernels and loaders (``model_executor/kernels/linear``, ``layers/quantization``, ``models/llama.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from compile_sparse.backends.vllm.coded import CodedTensor
from compile_sparse.compiler.linears import find_linears
from compile_sparse.compiler.program import Program
from compile_sparse.compiler.skip import Skip
from compile_sparse.compiler.targets import Target

__all__ = ["violations"]

_CPU_TILE = 32  # cpu_gemm_wna16 takes in- and out-sizes in multiples of this
_MARLIN_IN, _MARLIN_OUT = 128, 64
_CUTLASS = 16
_BLOCK = 128


def violations(program: Program, coded: Mapping[str, CodedTensor], target: Target) -> list[Skip]:
    """CS43xx for what vLLM refuses or would run wrongly, CS23xx for what it runs slowly. Needs no weights.

    Args:
        program: without quantize nodes.
        coded: its coded weights, by tensor name.
        target: of this backend.
    """
    if program.kind != "decoder":
        why = f"This is a model of kind {program.kind!r}; only text generation is measured in vLLM by this version."
        return [Skip("MODEL", "CS4306", why, "Compile it for ort-cpu.")]
    found = [*_experts(program, coded), *_parallel(program, coded, target)]
    for name, tensor in coded.items():
        found += [Skip(name, *reason) for reason in _shape(name, tensor, target)]
    found += _fused(program, coded, target)
    return _merged(found)


def _experts(program: Program, coded: Mapping[str, CodedTensor]) -> Iterator[Skip]:
    stacked = [
        binding.tensor
        for binding in program.bindings.values()
        if binding.kind == "parameter" and len(program.weights[binding.tensor].shape) == 3
    ]
    if coded and stacked:
        why = (
            "Its experts are stored as three-dimensional tensors, which are not quantized; vLLM expects every linear layer of "
            "such a model, experts included, in one scheme."
        )
        yield Skip(stacked[0], "CS4307", why, "Leave --quantize out; pruning of experts works.")


def _shape(name: str, tensor: CodedTensor, target: Target) -> Iterator[tuple[str, str, str]]:
    """(code, why, hint) per broken rule of one weight."""
    fmt, (rows, columns) = tensor.scheme.weights, tensor.shape
    shard = columns // target.tensor_parallel
    if fmt.group and columns % fmt.group:
        smaller = "w4a16-g32" if fmt.kind == "int" and columns % 32 == 0 else "w4a16-channel or w8a8"
        yield (
            "CS4301",
            f"Groups of {fmt.group} do not divide its {columns} inputs ({columns / fmt.group:g} groups), and vLLM has no last "
            "group of another size.",
            f"--quantize {smaller}, or remove a share that leaves a multiple of {fmt.group}.",
        )
    elif fmt.group and shard % fmt.group:
        yield (
            "CS4301",
            f"Split over {target.tensor_parallel} GPUs each would hold {columns / target.tensor_parallel:g} of its {columns} "
            f"inputs, which are no whole groups of {fmt.group}.",
            "A smaller --tensor-parallel, or a scheme with smaller groups.",
        )
    if fmt.block and (rows % _BLOCK or columns % _BLOCK):
        yield (
            "CS4302",
            f"Blocks of {_BLOCK}x{_BLOCK} do not divide its shape {rows}x{columns}.",
            "--quantize fp8, which has one scale per channel.",
        )
    if fmt.kind == "int" and not tensor.scheme.activations:
        per_int = 32 // fmt.bits
        if columns % per_int or (not fmt.symmetric and rows % per_int):
            yield (
                "CS4303",
                f"{fmt.bits}-bit codes are packed {per_int} to an integer, which does not divide its shape {rows}x{columns}.",
                "--quantize w8a8, or remove a share that leaves a multiple of 32.",
            )
        elif target.device == "cuda" and (columns % _MARLIN_IN or rows % _MARLIN_OUT):
            yield (
                "CS2331",
                f"The fast 4-bit kernel (Marlin) takes inputs in multiples of {_MARLIN_IN} and outputs of {_MARLIN_OUT}; this "
                f"weight is {rows}x{columns}, so vLLM chooses another one.",
                "",
            )
    elif target.device == "cuda" and (rows % _CUTLASS or columns % _CUTLASS):
        yield (
            "CS2331",
            f"The fast 8-bit kernels (CUTLASS) take sizes in multiples of {_CUTLASS}; this weight is {rows}x{columns}.",
            "",
        )


def _fused(program: Program, coded: Mapping[str, CodedTensor], target: Target) -> Iterator[Skip]:
    """vLLM joins linear layers that share an input (query, key and value; gate and up); its CPU kernel looks at the sum."""
    if target.device != "cpu":
        return
    by_input: dict[str, list[str]] = {}
    for linear in find_linears(program)[0]:
        if linear.tensor in coded:
            by_input.setdefault(linear.input.name, []).append(linear.tensor)
    for tensors in by_input.values():
        if coded[tensors[0]].scheme.activations or coded[tensors[0]].scheme.weights.kind != "int":
            continue
        columns, rows = coded[tensors[0]].shape[1], sum(coded[tensor].shape[0] for tensor in tensors)
        if columns % _CPU_TILE or rows % _CPU_TILE:
            why = (
                f"vLLM's CPU kernel for 4-bit weights takes sizes in multiples of {_CPU_TILE}; this layer has {columns} inputs "
                f"and {rows} outputs" + (f" ({len(tensors)} joined)." if len(tensors) > 1 else ".")
            )
            yield Skip(tensors[0], "CS4303", why, "--quantize w8a8, or remove a share that leaves a multiple of 32.")


def _parallel(program: Program, coded: Mapping[str, CodedTensor], target: Target) -> Iterator[Skip]:
    """Tensor parallelism splits heads and channels; what a GPU holds must be whole."""
    gpus = target.tensor_parallel
    if gpus == 1:
        return
    key_heads = {
        int(program.node(entry.placeholder).meta["val"].shape[1])
        for entry in program.inputs
        if entry.role == "past_key"
    }
    for heads in sorted(key_heads):
        if heads % gpus and gpus % heads:
            why = f"{heads} key-value heads can neither be split over {gpus} GPUs nor be repeated evenly on them."
            yield Skip("--tensor-parallel", "CS4308", why, "Remove another share of heads, or use fewer GPUs.")
    declared = int(program.config.get("num_attention_heads") or 0)
    width = _query_width(program)
    for query in sorted(width):
        if query % gpus:
            why = f"{query} query heads (of {declared} in the dense model) cannot be split over {gpus} GPUs."
            yield Skip("--tensor-parallel", "CS4308", why, "Remove another share of heads, or use fewer GPUs.")
    for linear in find_linears(program)[0]:
        rows = program.weights[linear.tensor].shape[1 - linear.axis]
        if rows % gpus and len(linear.node.users) and linear.tensor in coded:
            why = f"Its {rows} outputs cannot be split over {gpus} GPUs."
            yield Skip(linear.tensor, "CS4308", why, "Remove another share, or use fewer GPUs.")


def _query_width(program: Program) -> set[int]:
    """Numbers of query heads, over layers: the second size of attention's query."""
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and "scaled_dot_product_attention" in str(node.target):
            size = node.args[0].meta["val"].shape[1]
            if isinstance(size, int):
                found.add(size)
    return found


def _merged(skips: Sequence[Skip]) -> list[Skip]:
    """One entry per reason; how many others share it is said in words."""
    by_reason: dict[tuple[str, str, str], list[Skip]] = {}
    for skip in skips:
        by_reason.setdefault((skip.code, skip.why, skip.hint), []).append(skip)
    merged = []
    for same in by_reason.values():
        more = f" And {len(same) - 1} more of this size." if len(same) > 1 else ""
        merged.append(Skip(same[0].where, same[0].code, same[0].why + more, same[0].hint))
    return merged
