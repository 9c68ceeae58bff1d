"""What each lowering step changes in a tiny decoder, as text: lines of the printed graph before (``-``) and after (``+``) it.

    python -m tests.unit.lowering.goldens        writes the files again; review what changed

A step is given the program as the steps before it left it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import unified_diff
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from compile_sparse.compiler.capture import capture_model
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.lowering import MixedPrecision, raising_steps
from compile_sparse.testing.models import build_model

__all__ = ["CASES", "FOLDER", "change"]

FOLDER = Path(__file__).with_name("golden")
STEPS = (*raising_steps(), MixedPrecision(torch.float16))
CASES = {
    "rms_norm": ("llama", "raise rms_norm"),
    "gelu": ("gpt2", "raise gelu"),
    "attention_rotary": ("llama", "raise attention"),
    "attention": ("gpt2", "raise attention"),
    "attention_window": ("mistral", "raise attention"),
    "residual_rms_norm": ("llama", "raise residual_rms_norm"),
    "mixed_precision": ("llama", "mixed precision"),
}
"""File name -> model of ``compile_sparse.testing.models``, and the step whose change it shows."""


def change(program: Program, name: str) -> str:
    """What the step called ``name`` changes in ``program``."""
    for step in STEPS:
        after = step.run(program).program
        if step.name == name:
            lines = unified_diff([*_printed(program)], [*_printed(after)], "before", name, n=0, lineterm="")
            return "".join(f"{line}\n" for line in lines if not line.startswith("@@"))
        program = after
    raise KeyError(name)


def _printed(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op == "output":
            yield f"return {', '.join(map(str, program.output_nodes))}"
        else:
            given = program.tensor_of(node) or "input" if node.op == "placeholder" else _call(node)
            yield f"{node.name}: {_kind(node.meta['val'])} = {given}"


def _call(node: fx.Node) -> str:
    arguments = [str(value) for value in node.args] + [f"{key}={value}" for key, value in node.kwargs.items()]
    return f"{str(node.target) if hasattr(node.target, '_schema') else node.target.__name__}({', '.join(arguments)})"


def _kind(value: Any) -> str:
    """``float32[2, *, 64]``: an asterisk is a size that may differ."""
    if isinstance(value, torch.Tensor):
        sizes = (str(size) if isinstance(size, int) else "*" for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"
    return f"({', '.join(map(_kind, value))})" if isinstance(value, (tuple, list)) else "size"


def _write(program_of: Callable[[str], Program]) -> None:
    for case, (model, step) in CASES.items():
        (FOLDER / f"{case}.diff").write_text(change(program_of(model), step), encoding="utf-8")


if __name__ == "__main__":
    _write(cache(lambda name: capture_model(build_model(name))))
