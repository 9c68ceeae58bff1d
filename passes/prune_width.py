"""Remove hidden width: positions of the residual stream."""

from __future__ import annotations

from typing import ClassVar

from compile_sparse.compiler.axes.groups import Kind
from compile_sparse.passes.pruning.axis_pruning import AxisPruning

__all__ = ["PruneWidth"]


class PruneWidth(AxisPruning):
    """Remove a fraction of the hidden positions, everywhere at once.

    The residual stream ``x: [..., d]`` is one axis: embeddings, norms, every projection that reads or writes it and the output
    head lose the same positions. Norms then normalise over the kept positions, which is a different function, so every layer is
    refitted front to back to the dense network where calibration text is given.

    Left alone: models whose hidden state is an output (headless encoders): their callers rely on its size.
    """

    name: ClassVar[str] = "prune-width"
    kind: ClassVar[Kind] = "width"
    noun: ClassVar[str] = "hidden positions"
    nothing: ClassVar[str] = "The model has no residual stream whose width may change."
    refits_all: ClassVar[bool] = True
