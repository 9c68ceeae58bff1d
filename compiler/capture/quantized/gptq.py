"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum).

Tensors of a module, for a weight ``[N, K]`` of b bits in groups of g: ``qweight`` int32 ``[K * b / 32, N]``, packed along K;
``qzeros`` int32 ``[K / g, N * b / 32]``; ``scales`` ``[K / g, N]``; ``g_idx`` int32 ``[K]``, group of each input. A value is
``(code - zero point) * scale``. The first version of the format stores zero points less one, the second as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from compile_sparse.compiler.capture.quantized.modules import modules, require, require_shape
from compile_sparse.compiler.capture.quantized.packed import unpacked
from compile_sparse.compiler.capture.quantized.reading import Reading, as_stored, misfit, parsed, unread
from compile_sparse.compiler.capture.quantized.weights import Activations, Integers, computed
from compile_sparse.compiler.capture.safetensors_reader import StoredTensor

__all__ = ["Gptq", "read_gptq"]

_MARKS = {"qweight", "qzeros", "scales", "g_idx"}
_WORD = 32


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    bits: Literal[2, 3, 4, 8]
    group_size: int = Field(default=128, ge=-1)
    sym: bool = True
    form: str = Field(default="gptq", validation_alias=AliasChoices("checkpoint_format", "format"))
    dynamic: dict[str, Any] | None = None


@dataclass(frozen=True)
class Gptq:
    """One checkpoint's.

    Attributes:
        bits: per code.
        group: inputs per scale; 0 for all.
        symmetric: whether the config says that zero points are the middle of the range.
        less_one: whether zero points are stored less one.
    """

    bits: int
    group: int
    symmetric: bool
    less_one: bool
    name: str = "GPTQ"

    def read(self, tensors: Mapping[str, StoredTensor]) -> Reading:
        """See ``Method``."""
        found, rest = modules(tensors, _MARKS)
        reading = Reading(dict(rest))
        for stem, own in found.items():
            made = self._weight(stem, {part: as_stored(tensor) for part, tensor in own.items()})
            reading.add(f"{stem}.weight", made.source(Activations()), made.why_float)
        return reading

    def _weight(self, stem: str, own: Mapping[str, StoredTensor]) -> Integers:
        require(stem, own, ["qweight", "qzeros", "scales"])
        per_word, qweight, qzeros, scales = _WORD // self.bits, own["qweight"], own["qzeros"], own["scales"]
        if len(qweight.shape) != 2 or qweight.stored_dtype != torch.int32:
            raise misfit(f"{stem}.qweight", f"It is {qweight.stored_dtype} of shape {list(qweight.shape)}.")
        rows, columns = qweight.shape[1], qweight.shape[0] * per_word
        group = self.group if self.group < columns else 0
        groups = -(-columns // group) if group else 1
        require_shape(stem, "scales", scales, (groups, rows))
        require_shape(stem, "qzeros", qzeros, (groups, -(-rows // per_word)))
        zeros = self._zeros(stem, qzeros, rows)
        middle = 2 ** (self.bits - 1)
        symmetric = bool((zeros == middle).all())
        if self.symmetric and not symmetric:
            why = f"The config says symmetric, and zero points are {int(zeros.min())} to {int(zeros.max())}, not {middle}."
            raise misfit(f"{stem}.qzeros", f"{why} The checkpoint_format may be the other version's.")
        return Integers(
            (rows, columns),
            self.bits,
            group,
            lambda: unpacked(qweight.load(), self.bits, 0).t(),
            computed((rows, groups), lambda: scales.load().t(), scales.stored_dtype),
            None if symmetric else lambda: zeros.t(),
            self._order(stem, own, columns, group, groups),
        )

    def _zeros(self, stem: str, qzeros: StoredTensor, rows: int) -> torch.Tensor:
        """uint8 ``[groups, N]``. They are few, and decide which form the weight has."""
        zeros = unpacked(qzeros.load(), self.bits, 1)[:, :rows]
        if not self.less_one:
            return zeros
        if bool((zeros == 2**self.bits - 1).any()):
            why = f"A zero point is stored as {2**self.bits - 1}, less one: readers of this version of the format disagree "
            raise misfit(f"{stem}.qzeros", f"{why}whether it is 0 or {2**self.bits}.")
        return zeros + 1

    def _order(
        self, stem: str, own: Mapping[str, StoredTensor], columns: int, group: int, groups: int
    ) -> torch.Tensor | None:
        if "g_idx" not in own:
            return None
        require_shape(stem, "g_idx", own["g_idx"], (columns,))
        order = own["g_idx"].load().to(torch.int64)
        if not group:
            return None
        if bool((order < 0).any()) or bool((order >= groups).any()):
            raise misfit(f"{stem}.g_idx", f"It names groups outside 0 to {groups - 1}.")
        return None if torch.equal(order, torch.arange(columns) // group) else order


def read_gptq(raw: Any, where: str) -> Gptq:
    """The method of a GPTQ config.

    Raises:
        ModelError: CS2020, CS2021.
    """
    config = parsed(_Config, raw, where)
    form = config.form.lower()
    if form not in ("gptq", "gptq_v2") or (isinstance(raw, dict) and raw.get("is_marlin_format")):
        why = "It reads checkpoint_format gptq and gptq_v2."
        form = "marlin" if form == "gptq" else form
        raise unread(f"GPTQ weights in the format {form!r} are not read by this version.", where=where, why=why)
    if config.bits == 3:
        why = "Its codes lie across the borders of words. It reads 2, 4 and 8 bits."
        raise unread("GPTQ weights of 3 bits are not read by this version.", where=where, why=why)
    own = sorted(key for key in config.dynamic or {} if not key.startswith("-:"))
    if own:
        why = f"Some layers have settings of their own (dynamic: {own[0]})."
        raise unread("GPTQ checkpoints that mix settings are not read by this version.", where=where, why=why)
    return Gptq(config.bits, max(config.group_size, 0), config.sym, form == "gptq")
