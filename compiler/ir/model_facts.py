"""Facts that every model family writes under its own name in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["context_length", "layer_count"]


def context_length(config: Mapping[str, Any]) -> int | None:
    """Longest sequence in tokens, or None when the config states none."""
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def layer_count(config: Mapping[str, Any]) -> int:
    """Number of blocks; 0 when the config states none."""
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return 0
