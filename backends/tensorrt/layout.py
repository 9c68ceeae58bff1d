"""Names in a TensorRT artifact's model folder, and which of its files are made from the model. Imports nothing."""

from __future__ import annotations

__all__ = ["AHEAD_OF_TIME", "CHECKPOINT", "DERIVED", "ENGINE", "ENGINE_SUFFIX", "TWIN"]

ENGINE_SUFFIX = ".engine"
ENGINE, AHEAD_OF_TIME = f"model{ENGINE_SUFFIX}", f"model.rtx{ENGINE_SUFFIX}"
CHECKPOINT = "checkpoint"
"""Folder that holds the same model as a Hugging Face checkpoint."""
TWIN = "twin"
"""Folder that holds an engine of the same graph without sparse kernels, to be measured against."""
DERIVED = (f"{CHECKPOINT}/*", f"{TWIN}/*", f"*{ENGINE_SUFFIX}")
"""The model is the graph and its weights; these are made from it."""
