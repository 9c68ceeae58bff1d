"""A copy of a lowered folder whose graph tells the output of every layer, and the program as its kernels compute it.

What the graph tells beyond its own outputs is what the runtime would compute anyway; only fusions across a layer's output are
kept from happening, and the raised operators of our graphs leave few of these to the runtime.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import torch
from torch import fx

from compile_sparse.backends.onnx.emission import Emission
from compile_sparse.backends.onnx.external_data import MODEL_FILE, Sink
from compile_sparse.backends.onnx.graph_writer import GraphWriter
from compile_sparse.backends.onnxruntime.dialect import DIALECT
from compile_sparse.backends.onnxruntime.lowering import STEPS, declare_interface
from compile_sparse.compiler.extension.backend_contract import Observation
from compile_sparse.compiler.ir.gemms import gemm_of
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering import run_steps

__all__ = ["observe_folder", "round_groups", "with_kernel_rounding"]

_INT8_COMPUTE = 4
"""``accuracy_level`` of MatMulNBits at which the kernel rounds its input to int8."""


def observe_folder(program: Program, model: Path, scratch: Path) -> Observation:
    """Write the copy of ``model``, which ``program`` was lowered to, into ``scratch``; weights are linked, not copied."""
    names = _layer_names(program)
    graph = onnx.load(str(model / MODEL_FILE), load_external_data=False)
    producers = {name: node for node in graph.graph.node for name in node.output}
    outputs = {value.name for value in graph.graph.output}
    values = {node: name for node, name in names.items() if name in producers}
    for name in sorted(set(values.values()) - outputs):
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    for path in model.iterdir():
        if path.is_file() and path.name != MODEL_FILE:
            _link(path, scratch / path.name)
    onnx.save(graph, str(scratch / MODEL_FILE))
    groups = {node: group for node, name in values.items() if (group := _rounded_groups(producers[name]))}
    return Observation(scratch, values, with_kernel_rounding(program, groups))


def _layer_names(program: Program) -> dict[str, str]:
    """GEMM or convolution of the program -> ONNX name of its result, found by emitting the program without its weights."""
    prepared, _ = run_steps(program, STEPS)
    emission = Emission(prepared, GraphWriter(Sink()), dialect=DIALECT)
    declare_interface(emission)
    emission.run()
    own = {node.name for node in program.graph.nodes if gemm_of(node) is not None}
    names = {node.name: emission.value(node) for node in prepared.graph.nodes if gemm_of(node)}
    # What is an output has the output's name.
    names |= {node.name: entry.name for entry, node in zip(prepared.outputs, prepared.output_nodes, strict=True)}
    return {node: name for node, name in names.items() if node in own}


def _rounded_groups(node: onnx.NodeProto) -> int:
    """Elements of the input that share a scale inside this node's kernel; 0 when it does not round its input."""
    if node.op_type != "MatMulNBits":
        return 0
    given = {attribute.name: attribute.i for attribute in node.attribute}
    return int(given["block_size"]) if given.get("accuracy_level") == _INT8_COMPUTE else 0


def with_kernel_rounding(program: Program, groups: dict[str, int]) -> Program:
    """The program with the input of each node of ``groups`` rounded as MatMulNBits does; itself where there is none."""
    if not groups:
        return program
    edited = program.clone()
    made: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(edited.graph.nodes):
        gemm = gemm_of(node) if node.name in groups else None
        if gemm is None:
            continue
        key = (gemm.input, groups[node.name])
        if key not in made:
            with edited.graph.inserting_before(node):
                made[key] = edited.graph.call_function(round_groups, key)
            made[key].meta["val"] = gemm.input.meta["val"]
        node.replace_input_with(gemm.input, made[key])
    return edited


def round_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    """``x [..., K]`` on the grid the CPU kernel of MatMulNBits puts it on (MLAS, ``QuantizeARow_CompInt8``): in each group of
    ``group`` elements of a row, symmetric int8 codes of ``x * (127 / max|x|)``, rounded half to even, times ``max|x| / 127``.
    """
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    peak = padded.abs().amax(-1, keepdim=True)
    safe = torch.where(peak == 0, torch.ones_like(peak), peak)
    rounded = torch.round(padded * (127.0 / safe)) * (peak / 127.0)
    return rounded.flatten(-2)[..., : x.shape[-1]].contiguous()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
