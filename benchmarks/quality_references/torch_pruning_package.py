"""The package torch-pruning on MLP channels, where it runs: on a whole grouped-query Llama its group search does not end."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from quality_references.registry import Unavailable, reference
from quality_references.walk import accumulate_gradients

__all__: list[str] = []

FRACTION = 0.25


def prune_mlps(model: Any, windows: torch.Tensor, *, gradients: bool) -> dict[str, Any]:
    """Run ``BasePruner`` on each MLP alone, the down projection's outputs fixed.

    Raises:
        Unavailable: the package is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise Unavailable("torch-pruning is not installed (pip install torch-pruning).") from error
    if gradients:
        accumulate_gradients(model, windows)
    importance = torch_pruning.importance
    for layer in model.model.layers:
        example = torch.zeros(1, 4, model.config.hidden_size)
        pruner = torch_pruning.pruner.BasePruner(
            layer.mlp,
            example,
            importance=importance.GroupTaylorImportance() if gradients else importance.GroupMagnitudeImportance(),
            pruning_ratio=FRACTION,
            ignored_layers=[layer.mlp.down_proj],
        )
        pruner.step()
    model.zero_grad()
    return {"torch_pruning": torch_pruning.__version__}


reference("channels", "mlp25-tp-magnitude", "torch-pruning")(partial(prune_mlps, gradients=False))
reference("channels", "mlp25-tp-taylor", "torch-pruning")(partial(prune_mlps, gradients=True))
