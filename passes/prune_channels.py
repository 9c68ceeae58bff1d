"""Remove MLP channels: the positions between an up projection and the down projection that contracts them."""

from __future__ import annotations

from typing import ClassVar

from compile_sparse.compiler.axes.groups import Kind
from compile_sparse.passes.pruning.axis_pruning import AxisPruning

__all__ = ["PruneChannels"]


class PruneChannels(AxisPruning):
    """Remove a fraction of the channels of every MLP, or of all MLPs together.

    For a group with ``n`` channels, ``W_up: [n, d]`` and ``W_down: [d, n]``, ``k`` channels stay: ``W_up[keep]``,
    ``b_up[keep]``, ``W_down[:, keep]``, and gates likewise; ``W_down`` is then refitted to the dense network's output. With
    uniform allocation ``k`` depends on ``n`` only, so a Hugging Face config with one intermediate size can describe the result.

    Left alone: groups whose axis is frozen, and sizes that no multiple of the target's alignment below ``n`` can replace.
    """

    name: ClassVar[str] = "prune-channels"
    kind: ClassVar[Kind] = "channels"
    noun: ClassVar[str] = "channels"
    nothing: ClassVar[str] = (
        "The model has no MLP channels: no axis lies only between weights that make and contract it."
    )
