"""Every tensor of a model folder under the names of its files; an adapter's folder: of its base, with the adapter merged."""

from __future__ import annotations

import torch

from compile_sparse.compiler.capture.adapter import merged
from compile_sparse.compiler.capture.folder import ModelFolder
from compile_sparse.compiler.capture.safetensors_reader import read_checkpoint
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["stored_tensors"]


def stored_tensors(folder: ModelFolder, dtype: torch.dtype, *, required: bool = True) -> dict[str, TensorSource]:
    """Sources by stored name; floating-point ones are converted to ``dtype`` on load. Empty for a folder without weights.

    Args:
        required: False: no weights is an answer, not an error.

    Raises:
        ModelError: CS2003, CS2004, CS2010 as ``weight_files``; CS2015 an adapter that cannot be merged.
    """
    found: dict[str, TensorSource] = dict(read_checkpoint(folder.weight_files(required=required), dtype))
    if folder.adapter is not None and found:
        return merged(folder.adapter, found, folder.model_class, folder.config, dtype)
    return found
