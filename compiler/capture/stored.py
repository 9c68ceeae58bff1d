"""Every tensor of a model folder by its stored name: codes as the values they stand for, an adapter merged into its base."""

from __future__ import annotations

import torch

from compile_sparse.compiler.capture.adapter import merged
from compile_sparse.compiler.capture.folder import ModelFolder
from compile_sparse.compiler.capture.quantized.decoding import decoded
from compile_sparse.compiler.capture.safetensors_reader import read_checkpoint
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["read_stored", "stored_tensors"]


def stored_tensors(folder: ModelFolder, dtype: torch.dtype, *, required: bool = True) -> dict[str, TensorSource]:
    """Sources by stored name, as ``read_stored`` gives them."""
    return read_stored(folder, dtype, required=required)[0]


def read_stored(
    folder: ModelFolder, dtype: torch.dtype, *, required: bool = True
) -> tuple[dict[str, TensorSource], tuple[Diagnostic, ...]]:
    """Sources by stored name, and what is to be said of them; floating-point ones are converted to ``dtype`` on load. Empty for a
    folder without weights.

    Args:
        required: False: no weights is an answer, not an error.

    Raises:
        ModelError: CS2003, CS2004, CS2010 as ``weight_files``; CS2015 an adapter that cannot be merged; CS2020, CS2021 codes that
            are not read, or do not fit.
    """
    found, said = decoded(read_checkpoint(folder.weight_files(required=required), dtype), folder.quantization, dtype)
    if folder.adapter is not None and found:
        return merged(folder.adapter, found, folder.model_class, folder.config, dtype), said
    return found, said
