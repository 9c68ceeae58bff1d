"""Remove channels of convolutions."""

from __future__ import annotations

from typing import ClassVar

from compile_sparse.compiler.axes.groups import Kind
from compile_sparse.passes.pruning.axis_pruning import AxisPruning

__all__ = ["PruneConv"]


class PruneConv(AxisPruning):
    """Remove a fraction of the channels of convolutions.

    For ``W: [out, in, h, w]`` an axis runs from a convolution's ``out`` through batch and group norms, depthwise convolutions
    and residual sums to every ``in`` it feeds; all lose the same channels.

    Left alone: channels of images, classes, and stages that are outputs of the model.
    """

    name: ClassVar[str] = "prune-conv"
    kind: ClassVar[Kind] = "conv"
    noun: ClassVar[str] = "channels"
    nothing: ClassVar[str] = "The model has no convolutions whose channels may change."
