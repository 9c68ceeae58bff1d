"""The weight files of the source: how large they are, in which type, and which tensors keep theirs in an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from compile_sparse.compiler.capture.folder import ModelFolder
from compile_sparse.compiler.capture.safetensors_reader import read_checkpoint
from compile_sparse.compiler.capture.side_files import find_side_files
from compile_sparse.compiler.capture.weight_files import weight_files
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import cast_weights, commonest_type, precision_of, stored_types, torch_dtype
from compile_sparse.compiler.targets.target import Precision, Target

__all__ = ["as_stored", "rounding_note", "source_bytes", "source_precision"]

_SIGNIFICANT_BITS: dict[Precision, int] = {"fp32": 24, "fp16": 11, "bf16": 8}


def source_precision(folder: ModelFolder) -> Precision | None:
    """What most elements of the weight files are stored in, whatever the config says; what the config says where there are none.

    None for a type that is no precision of a target.
    """
    return precision_of(_commonest_in(folder.weight_files(required=False)) or folder.config.dtype)


def rounding_note(folder: ModelFolder, precision: Precision) -> tuple[str, ...]:
    """A sentence where ``precision`` has fewer significant bits than the weight files: the baseline's weights are rounded too, so
    that no comparison with it shows what that costs.
    """
    stored = source_precision(folder)
    if stored is None or _SIGNIFICANT_BITS[precision] >= _SIGNIFICANT_BITS[stored]:
        return ()
    return (
        f"Weights that are not quantized are stored as {precision} ({_SIGNIFICANT_BITS[precision]} significant bits), the dense "
        f"baseline's too; the source's files have {stored} ({_SIGNIFICANT_BITS[stored]}).",
    )


def source_bytes(folder: ModelFolder) -> int:
    """Bytes of what the user has: weight files that are read, config, and side files."""
    paths = {folder.path / "config.json", *folder.weight_files(required=False), *find_side_files(folder.path)}
    return sum(path.stat().st_size for path in paths)


def as_stored(program: Program, dense: Program, target: Target, precision: Precision) -> Program:
    """``program`` with its weights rounded to the types they are stored in for ``target``.

    Args:
        program: computes in float32.
        dense: the model as it was captured: the types in its files are kept, tensor by tensor, where ``precision`` is the type of
            most of them.
        target: decides whether they are.
        precision: of everything else.
    """
    dtype, folder = torch_dtype(precision), dense.source.folder
    if not target.keeps_precision or folder is None:
        return cast_weights(program, dtype)
    files = weight_files(folder, str(dense.config.get("transformers_weights") or ""), required=False)
    return cast_weights(program, dtype, stored_types(dense) if _commonest_in(files) == dtype else {})


def _commonest_in(files: Sequence[Path]) -> torch.dtype | None:
    tensors = read_checkpoint(files, torch.float32).values()
    # Codes of 8 bits are no precision.
    return commonest_type((t.stored_dtype, prod(t.shape)) for t in tensors if precision_of(t.stored_dtype))
