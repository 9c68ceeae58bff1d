"""Our own settings, run through the compiler: one line of data per row of the quality benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compile_sparse.compiler.capture import capture, open_folder
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.recipes.recipe import Recipe
from compile_sparse.compiler.targets.target import find_target

__all__ = ["OURS", "Row", "compile_row", "dense_program", "logits_of"]


@dataclass(frozen=True)
class Row:
    """One setting of ours.

    Attributes:
        kind: which references it is compared with.
        passes: pass name -> options, in order, as in a recipe.
        target: whose alignment the kept widths follow.
        alignment: replaces the target's, for rows that must leave exactly as much as a reference; None keeps it.
    """

    kind: str
    passes: Mapping[str, Mapping[str, Any]]
    target: str = "ort-cpu"
    alignment: int | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; a row of a report is reused only while this is the same."""
        return {
            "passes": {name: dict(options) for name, options in self.passes.items()},
            "target": self.target,
            "alignment": self.alignment,
        }


OURS: dict[str, Row] = {
    "ours-mlp25": Row("channels", {"prune-channels": {"fraction": 0.25}}),
    "ours-mlp25-global": Row("channels", {"prune-channels": {"fraction": 0.25, "allocation": "global"}}),
    "ours-kv25": Row("heads", {"prune-heads": {"fraction": 0.25}}),
    "ours-kv25-global": Row("heads", {"prune-heads": {"fraction": 0.25, "allocation": "global"}}),
    "ours-depth25": Row("layers", {"prune-layers": {"fraction": 0.25}}),
    "ours-width12": Row("width", {"prune-width": {"fraction": 0.125}}),
    "ours-rank80": Row("low-rank", {"low-rank": {"fraction": 0.2}}),
    "ours-rank78": Row("low-rank", {"low-rank": {"fraction": 0.22}}),
}


def dense_program(model: Path) -> Program:
    """The model as the compiler sees it, weights in float32."""
    return capture(open_folder(str(model)), dtype=torch.float32)


def compile_row(program: Program, row: Row, windows: torch.Tensor) -> tuple[Program, dict[str, Any]]:
    """The program after a row's passes, and what they achieved.

    Args:
        program: the dense model.
        row: the setting.
        windows: calibration token ids ``[W, S]``.
    """
    recipe = Recipe.model_validate({"passes": [{name: dict(options)} for name, options in row.passes.items()]})
    passes = recipe.build_passes()
    target = find_target(row.target)
    if row.alignment is not None:
        target = target.model_copy(update={"alignment": row.alignment})
    context = PassContext(
        target=target,
        progress=SilentProgress(),
        calibration=CalibrationStream(tuple(tuple(window) for window in windows.tolist())),
        seed=recipe.seed,
        contraction_multiple=math.lcm(*(getattr(step, "contraction_multiple", 1) for step in passes)),
    )
    made, sections = run_passes(program, passes, context)
    return made, {section.name: dict(section.achieved) for section in sections}


def logits_of(program: Program) -> Callable[[torch.Tensor], torch.Tensor]:
    """Token ids ``[B, S]`` to logits ``[B, S, V]``, in torch."""
    executor = Executor(program)
    (name,) = [output.name for output in program.outputs if output.role == "logits"]
    return lambda ids: executor.run(decoder_inputs(program, ids))[name]
