"""Set the smallest weights to zero in a pattern: N:M, unstructured or blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from compile_sparse.compiler.contract import PassContext, PassResult
from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.linears import Linear, find_linears, makes_logits
from compile_sparse.compiler.program import Program, SparsityMask
from compile_sparse.compiler.skip import Skip
from compile_sparse.compiler.targets import Target
from compile_sparse.compiler.weights import AbsentTensor, DerivedTensor, TensorSource

__all__ = ["Mask"]

FORMS = re.compile(r"(?P<n>\d+):(?P<m>\d+)|block=(?P<rows>\d+)x(?P<columns>\d+):(?P<share>0?\.\d+)|(?P<plain>0?\.\d+)")


class Mask(BaseModel):
    """Zero the weights of smallest magnitude in every linear layer.

    ``N:M``: in every run of M weights along the contraction dimension, M - N become zero (arXiv:2104.08378). A fraction such as
    ``0.5``: that share of each tensor. ``block=16x16:0.5``: that share of the blocks of each tensor, by their sum of
    magnitudes. The zeros are stored, and recorded as an annotation that later passes must keep.

    Leaves alone: the projection that makes the logits, tensors with another use (tied embeddings), and tensors whose sizes
    the pattern does not divide.

    Shapes do not change. ``W: [N, K]`` (linear) or ``[K, N]`` (addmm).

    Raises (from ``run``):
        ModelError: CS2203, no tensor fits the pattern.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str] = "mask"
    stage: ClassVar[str] = "masks"

    pattern: str = Field(description="'2:4' (N:M), '0.5' (share of zeros), or 'block=16x16:0.5'")

    @field_validator("pattern")
    @classmethod
    def _known_form(cls, value: str) -> str:
        found = FORMS.fullmatch(value)
        if found is None or (found["n"] and not 0 < int(found["n"]) < int(found["m"])):
            raise ValueError("write N:M with 0 < N < M, a fraction between 0 and 1 such as 0.5, or block=16x16:0.5")
        if float(found["plain"] or found["share"] or 0.5) <= 0 or (
            found["rows"] and 0 in (int(found["rows"]), int(found["columns"]))
        ):
            raise ValueError("the fraction and the block sides must be positive")
        return value

    @property
    def zero_fraction(self) -> float:
        """Share of the masked weights that become zero."""
        found = FORMS.fullmatch(self.pattern)
        if found is None:  # the validator has seen to it
            raise ValueError(self.pattern)
        return 1 - int(found["n"]) / int(found["m"]) if found["n"] else float(found["plain"] or found["share"])

    @property
    def family(self) -> str:
        """The name targets know the pattern by: itself for N:M, ``unstructured`` or ``block``."""
        return (
            self.pattern
            if ":" in self.pattern and "=" not in self.pattern
            else ("block" if self.pattern.startswith("block") else "unstructured")
        )

    def useless_on(self, target: Target) -> Sequence[Skip]:
        """A reason when the target's kernels do not skip these zeros."""
        entry = target.pattern(self.family)
        if entry is not None and entry.pays:
            return ()
        if entry is None:
            why = f"{target.name} declares no kernel that skips zeros of this pattern."
            return (Skip(f"--sparsity {self.pattern}", "CS4103", why, "Use --prune or --quantize."),)
        measured = f" Measured: {entry.measured}." if entry.measured else ""
        hint = f"Use {entry.instead}." if entry.instead else ""
        return (Skip(f"--sparsity {self.pattern}", "CS4103", f"{entry.why}.{measured}", hint),)

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        linears, skips = find_linears(edited)
        changes: dict[str, TensorSource] = {}
        masks = dict(edited.masks)
        for linear in linears:
            reason = self._unfit(edited, linear)
            if reason:
                skips.append(Skip(linear.tensor, "CS2204", reason))
            elif linear.tensor not in changes:
                source = edited.weights[linear.tensor]
                changes[linear.tensor] = self._masked(source, linear.axis)
                axis = linear.axis if self.family == self.pattern else -1
                masks[linear.tensor] = SparsityMask(self.pattern, axis, self.zero_fraction)
        if not changes:
            raise ModelError(
                "CS2203", f"No tensor fits the pattern {self.pattern}.", where="mask", why=skips[0].why if skips else ""
            )
        masked = replace(edited, weights=edited.weights.updated(changes), masks=masks)
        return PassResult(
            program=masked,
            modified=True,
            requested={"pattern": self.pattern},
            achieved={
                "tensors": len(changes),
                "zeros": round(sum(self.zero_fraction * masked.weights.elements(name) for name in changes)),
            },
            skips=skips,
        )

    def _unfit(self, program: Program, linear: Linear) -> str:
        shape, found = program.weights[linear.tensor].shape, FORMS.fullmatch(self.pattern)
        if makes_logits(program, linear.node):
            return "It makes the logits, where every zero is felt directly."
        if any(user.args[:1] == (linear.weight,) for user in linear.weight.users):
            return "Its tensor has another use (a tied embedding)."
        if found and found["m"] and shape[linear.axis] % int(found["m"]):
            return f"Its contraction dimension {shape[linear.axis]} is not a multiple of {found['m']}."
        if found and found["rows"] and (shape[0] % int(found["rows"]) or shape[1] % int(found["columns"])):
            return f"Its shape {list(shape)} does not divide into {found['rows']}x{found['columns']} blocks."
        return ""

    def _masked(self, source: TensorSource, axis: int) -> TensorSource:
        if isinstance(source, AbsentTensor):
            return source
        return DerivedTensor(source.shape, source.dtype, lambda: self._apply(source.load(), axis))

    def _apply(self, weight: torch.Tensor, axis: int) -> torch.Tensor:
        found = FORMS.fullmatch(self.pattern)
        if found and found["m"]:
            n, m = int(found["n"]), int(found["m"])
            rows = weight.movedim(axis, -1)
            runs = rows.reshape(-1, m)
            smallest = runs.abs().argsort(dim=1, stable=True)[:, : m - n]
            return runs.scatter(1, smallest, 0.0).view(rows.shape).movedim(-1, axis).contiguous()
        if found and found["rows"]:
            high, wide = int(found["rows"]), int(found["columns"])
            blocks = weight.view(weight.shape[0] // high, high, weight.shape[1] // wide, wide)
            size = blocks.abs().sum((1, 3))
            keep = torch.ones(size.numel(), dtype=torch.bool)
            keep[size.flatten().argsort(stable=True)[: round(size.numel() * self.zero_fraction)]] = False
            return (blocks * keep.view(size.shape)[:, None, :, None]).view(weight.shape)
        order = weight.abs().flatten().argsort(stable=True)[: round(weight.numel() * self.zero_fraction)]
        return weight.flatten().index_fill(0, order, 0.0).view(weight.shape)
