"""From the tensors of a checkpoint to one source per weight, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compile_sparse.compiler.capture.quantized.reading import Method, Reading, unread
from compile_sparse.compiler.capture.quantized.weights import computed
from compile_sparse.compiler.capture.safetensors_reader import CODED, StoredTensor
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["decoded", "fused"]

_CODES = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "quant_map", "SCB")
"""Last parts of names that only quantized checkpoints have."""


def decoded(
    tensors: Mapping[str, StoredTensor], method: Method | None, dtype: torch.dtype
) -> tuple[dict[str, TensorSource], tuple[Diagnostic, ...]]:
    """One tensor per weight.

    Args:
        tensors: every stored tensor by name.
        method: of the checkpoint; None where nothing says that it is quantized.
        dtype: type weights are read in. Only in float32 are quantized ones ``QuantizedTensor``s.

    Raises:
        ModelError: CS2020 for codes that are not read, or that nothing describes; CS2021 for codes that do not fit.
    """
    reading = method.read(tensors) if method is not None else Reading(dict(tensors))
    for name, source in reading.sources.items():
        if source.dtype in CODED or name.rpartition(".")[2] in _CODES:
            raise unread(
                "A weight file holds codes whose meaning is not known.",
                where=name,
                why=f"{method.name} does not account for them." if method else "Nothing says how they were quantized.",
            )
    if dtype != torch.float32:
        reading.sources = {name: _cast(source, dtype) for name, source in reading.sources.items()}
    return reading.sources, reading.diagnostics()


def _cast(source: TensorSource, dtype: torch.dtype) -> TensorSource:
    if isinstance(source, StoredTensor) or not source.dtype.is_floating_point:
        return source
    return computed(source.shape, source.load, dtype)


def fused(checkpoint: Mapping[str, TensorSource], sources: Mapping[str, TensorSource]) -> tuple[Diagnostic, ...]:
    """What is lost because the model holds several stored weights as one.

    Args:
        checkpoint: what ``decoded`` gave.
        sources: of the model's tensors.
    """
    bound = {id(source) for source in sources.values()}
    lost = [name for name, each in checkpoint.items() if isinstance(each, QuantizedTensor) and id(each) not in bound]
    reading = Reading(
        floats={"The model's class holds it and others as one tensor, or not at all.": lost} if lost else {}
    )
    return reading.diagnostics()
