"""AWQ checkpoints (AutoAWQ), in the layout called "gemm".

Tensors of a module, for a weight ``[N, K]`` in groups of g: ``qweight`` int32 ``[K, N / 8]``, eight outputs to a word in the
order 0, 2, 4, 6, 1, 3, 5, 7; ``qzeros`` int32 ``[K / g, N / 8]`` in the same order; ``scales`` ``[K / g, N]``. A value is
``(code - zero point) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from compile_sparse.compiler.capture.quantized.modules import modules, require, require_shape
from compile_sparse.compiler.capture.quantized.packed import AWQ_ORDER, unpacked
from compile_sparse.compiler.capture.quantized.reading import Reading, as_stored, misfit, parsed, unread
from compile_sparse.compiler.capture.quantized.weights import Activations, Integers, computed
from compile_sparse.compiler.capture.safetensors_reader import StoredTensor

__all__ = ["Awq", "read_awq"]

_MARKS = {"qweight", "qzeros", "scales"}
_BITS, _PER_WORD = 4, 8


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    bits: int = Field(default=_BITS, validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(default=128, ge=-1, validation_alias=AliasChoices("group_size", "q_group_size"))
    zero_point: bool = True
    version: str = Field(default="gemm", validation_alias=AliasChoices("version", "format"))


@dataclass(frozen=True)
class Awq:
    """One checkpoint's.

    Attributes:
        group: inputs per scale; 0 for all.
        zero_point: whether zero points are stored.
    """

    group: int
    zero_point: bool
    name: str = "AWQ"

    def read(self, tensors: Mapping[str, StoredTensor]) -> Reading:
        """See ``Method``."""
        found, rest = modules(tensors, _MARKS)
        reading = Reading(dict(rest))
        for stem, own in found.items():
            made = self._weight(stem, {part: as_stored(tensor) for part, tensor in own.items()})
            reading.sources[f"{stem}.weight"] = made.source(Activations())
        return reading

    def _weight(self, stem: str, own: Mapping[str, StoredTensor]) -> Integers:
        require(stem, own, ["qweight", "scales", *(["qzeros"] if self.zero_point else [])])
        qweight, scales = own["qweight"], own["scales"]
        if len(qweight.shape) != 2 or qweight.stored_dtype != torch.int32:
            raise misfit(f"{stem}.qweight", f"It is {qweight.stored_dtype} of shape {list(qweight.shape)}.")
        columns, rows = qweight.shape[0], qweight.shape[1] * _PER_WORD
        group = self.group if self.group < columns else 0
        groups = -(-columns // group) if group else 1
        require_shape(stem, "scales", scales, (groups, rows))
        zeros = None
        if "qzeros" in own:
            require_shape(stem, "qzeros", own["qzeros"], (groups, rows // _PER_WORD))
            # They are few, and decide which form the weight has.
            points = unpacked(own["qzeros"].load(), _BITS, 1, AWQ_ORDER).t()
            zeros = None if bool((points == 2 ** (_BITS - 1)).all()) else lambda: points
        return Integers(
            (rows, columns),
            _BITS,
            group,
            lambda: unpacked(qweight.load(), _BITS, 1, AWQ_ORDER).t(),
            computed((rows, groups), lambda: scales.load().t(), scales.stored_dtype),
            zeros,
        )


def read_awq(raw: Any, where: str) -> Awq:
    """The method of an AWQ config.

    Raises:
        ModelError: CS2020, CS2021.
    """
    config = parsed(_Config, raw, where)
    if config.version.lower() != "gemm":
        why = "It reads the layout 'gemm'."
        raise unread(
            f"AWQ weights in the layout {config.version!r} are not read by this version.", where=where, why=why
        )
    if config.bits != _BITS:
        raise unread(f"AWQ weights of {config.bits} bits are not read by this version.", where=where, why="It reads 4.")
    return Awq(max(config.group_size, 0), config.zero_point)
