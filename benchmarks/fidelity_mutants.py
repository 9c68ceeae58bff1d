"""Wrong artifacts that load: one thing changed in one layer of a Llama-like program, as small as mistakes in practice are.

Lowering the changed program and checking the folder against the honest one is what a wrong exporter, file or kernel looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.external_data_helper import load_external_data_for_tensor

from compile_sparse.compiler.ir.program import CODES, Program
from compile_sparse.compiler.ir.weights import DerivedTensor
from compile_sparse.compiler.lowering.rotary import ROTARY_PREFIX

__all__ = ["FILE_MUTANTS", "MUTANTS", "shifted_rotation"]

Change = Callable[[torch.Tensor], torch.Tensor]


def _changed(program: Program, tensor: str, change: Change) -> Program:
    source = program.weights[tensor]
    made = DerivedTensor(tuple(source.shape), source.dtype, lambda: change(source.load()).contiguous())
    return replace(program, weights=program.weights.updated({tensor: made}))


def _middle(program: Program, ending: str) -> str:
    """The tensor with this ending, codes or not, in the middle of the model."""
    found = [name for name in program.weights if name.removesuffix(CODES).endswith(ending)]
    if not found:
        raise LookupError(f"the program has no {ending}")
    return found[len(found) // 2]


def _scaled(ending: str) -> Callable[[Program], Program]:
    def mutate(program: Program) -> Program:
        name = _middle(program, ending)
        scale = name.removesuffix(CODES) + ".scale"
        return _changed(program, scale if scale in program.weights else name, lambda value: value * 1.02)

    return mutate


def _heads(program: Program, ending: str, heads: int) -> Program:
    """Heads 0 and 1 of a projection in each other's place, with their scales."""
    order = [1, 0, *range(2, heads)]

    def swap(value: torch.Tensor) -> torch.Tensor:
        return value.unflatten(0, (heads, -1))[order].flatten(0, 1)

    name = _middle(program, ending)
    changed = _changed(program, name, swap)
    scale = name.removesuffix(CODES) + ".scale"
    return _changed(changed, scale, swap) if scale in program.weights else changed


def _swapped_query_heads(program: Program) -> Program:
    return _heads(program, "q_proj.weight", int(program.config["num_attention_heads"]))


def _swapped_key_heads(program: Program) -> Program:
    return _heads(program, "k_proj.weight", int(program.config["num_key_value_heads"]))


def _dropped_norm(program: Program) -> Program:
    return _changed(program, _middle(program, "post_attention_layernorm.weight"), torch.ones_like)


def _swapped_pairs(program: Program) -> Program:
    """Neighbours along the contraction in each other's place, as swapped nibbles are."""
    name = _middle(program, "up_proj.weight")
    return _changed(program, name, lambda value: value.unflatten(1, (-1, 2)).flip(2).flatten(1))


def _turned_scales(program: Program) -> Program:
    """Scales per group in the order of the other axis."""
    scale = _middle(program, "up_proj.weight").removesuffix(CODES) + ".scale"
    shape = program.weights[scale].shape if scale in program.weights else ()
    if len(shape) < 2 or shape[1] < 2:
        raise LookupError("the program has no scales per group")
    return _changed(program, scale, lambda value: value.t().reshape(value.shape))


def _one_expert(program: Program) -> Program:
    """The weights of one expert off by 2 %, where experts are one tensor."""
    found = [
        name for name, source in program.weights.items() if len(source.shape) == 3 and name.endswith("gate_up_proj")
    ]
    if not found:
        raise LookupError("the program has no experts in one tensor")

    def scale(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone()
        changed[-1] *= 1.02
        return changed

    return _changed(program, found[len(found) // 2], scale)


MUTANTS: Mapping[str, Callable[[Program], Program]] = {
    **{
        f"scales of one {kind}_proj x 1.02": _scaled(f"{kind}_proj.weight")
        for kind in ["q", "k", "v", "o", "gate", "up", "down"]
    },
    "two query heads swapped": _swapped_query_heads,
    "two key heads swapped": _swapped_key_heads,
    "one norm's weight dropped": _dropped_norm,
    "neighbours swapped (nibbles)": _swapped_pairs,
    "scales along the wrong axis": _turned_scales,
    "one expert's weights x 1.02": _one_expert,
}
"""Name -> change. A change that a program cannot have (no groups) raises LookupError."""


def shifted_rotation(model: Path, first: int = 32) -> None:
    """Rotary angles from position ``first`` on become those of the next one: distances across it are off by one."""
    graph = onnx.load(str(model / "model.onnx"), load_external_data=False).graph
    tables = [tensor for tensor in graph.initializer if tensor.name.startswith(ROTARY_PREFIX)]
    if not tables:
        raise LookupError("the graph has no rotary tables")
    for tensor in tables:
        place = {entry.key: entry.value for entry in tensor.external_data}
        load_external_data_for_tensor(tensor, str(model))
        values = np.frombuffer(tensor.raw_data, np.float32).reshape(tuple(tensor.dims)).copy()
        values[first:-1] = values[first + 1 :]
        with (model / place["location"]).open("r+b") as file:
            file.seek(int(place.get("offset", 0)))
            file.write(values.tobytes())


FILE_MUTANTS: Mapping[str, Callable[[Path], None]] = {"rotary angles off by one position": shifted_rotation}
"""Name -> change of a lowered folder."""
