"""Set the least important weights to zero in a pattern: N:M, unstructured or blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError, UsageError
from compile_sparse.compiler.extension.pass_contract import PassContext, PassResult, Phase, ZeroingPass
from compile_sparse.compiler.ir.contractions import Contraction, find_contractions
from compile_sparse.compiler.ir.linears import is_lm_head
from compile_sparse.compiler.ir.program import Program, SparsityMask
from compile_sparse.compiler.ir.sparsity_pattern import SparsityPattern
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, TensorSource
from compile_sparse.compiler.targets.target import Target
from compile_sparse.passes.sparsity.patterns import apply_pattern
from compile_sparse.passes.statistics.norms import feature_norms

__all__ = ["Sparsify"]


class Sparsify(ZeroingPass):
    """Zero the weights of lowest score in every linear layer and, for N:M, in every convolution.

    ``N:M``: in every run of M weights along the contraction dimension, M - N become zero (arXiv:2104.08378); along the input
    channels of a convolution, each position of the kernel by itself. A fraction such as ``0.5``: that share of each tensor.
    ``block=16x16:0.5``: that share of the blocks of each tensor, by the sum of their scores. The zeros are stored, and recorded
    as an annotation that later passes must keep (``compiler/ir/verify_masks.py`` checks it).

    Scores: ``magnitude``, ``|W[n, k]|``; ``wanda``, ``|W[n, k]| ||x_k||_2`` with the norm of input feature k over all calibration
    tokens (arXiv:2306.11695), of a channel over all its positions for a convolution. The inputs are those of the program that
    the pass is given: one run over the text, where the paper's code feeds each block what the blocks already masked make of it. A
    fraction is then taken of every output row, as in the paper.

    Leaves alone: the lm_head, where every zero is felt directly; tensors with another use (tied
    embeddings); grouped and transposed convolutions, and for other patterns all of them; tensors whose sizes the pattern does
    not divide (CS2204); and layers that the target's kernels for the pattern do not take or do not run faster, by its
    ``min_in_features``, ``min_out_features``, ``in_features_multiple`` and ``out_features_multiple`` (CS2208): zeros there would
    cost quality for nothing.

    Shapes do not change. ``W: [N, K]`` (linear), ``[K, N]`` (addmm) or ``[N, K, *kernel]`` (convolution).

    Raises (from ``run``):
        ModelError: CS2203, no tensor is left to mask.
        UsageError: CS1121, the criterion needs calibration text and there is none.
    """

    name: ClassVar[str] = "mask"
    phase: ClassVar[Phase] = "masks"
    changes_numerics: ClassVar[bool] = False

    pattern: str = Field(description="'2:4' (N:M), '0.5' (share of zeros), or 'block=16x16:0.5'")
    criterion: Literal["magnitude", "wanda"] = Field(
        default="magnitude",
        description="what a weight is ranked by; wanda: its magnitude times the norm of its input on calibration text",
    )

    @field_validator("pattern")
    @classmethod
    def _known_form(cls, value: str) -> str:
        return SparsityPattern.parse(value).text

    @property
    def zero_fraction(self) -> float:
        """Share of the masked weights that become zero."""
        return SparsityPattern.parse(self.pattern).zero_fraction

    def useless_on(self, target: Target) -> Sequence[Diagnostic]:
        """A reason when the target's kernels do not skip these zeros."""
        entry = target.pattern(SparsityPattern.parse(self.pattern).family)
        if entry is not None and entry.pays:
            return ()
        if entry is None:
            why = f"{target.name} declares no kernel that skips zeros of this pattern."
            return (
                Diagnostic(f"--sparsity {self.pattern}", "CS4103", why, "Use --prune or --quantize.", severity="error"),
            )
        measured = f" Measured: {entry.measured}." if entry.measured else ""
        hint = f"Use {entry.instead}." if entry.instead else ""
        return (Diagnostic(f"--sparsity {self.pattern}", "CS4103", f"{entry.why}.{measured}", hint, severity="error"),)

    def run(self, program: Program, context: PassContext) -> PassResult:
        self._require_text(context)
        pattern = SparsityPattern.parse(self.pattern)
        found, diagnostics = find_contractions(program)
        chosen: list[Contraction] = []
        for each in found:
            reason = _unfit(program, each, pattern) or _unrewarded(each, pattern, context.target)
            if reason is None:
                chosen.append(each)
            else:
                diagnostics.append(reason)
        if not chosen:
            raise _nothing_left(pattern, diagnostics, context.target)
        wanda = self.criterion == "wanda"
        norms = _input_norms(program, chosen, context) if wanda and not context.plan_only else {}
        changes: dict[str, TensorSource] = {}
        masks = dict(program.masks)
        zeros = 0
        for each in chosen:
            source = program.weights[each.tensor]
            blind = isinstance(source, AbsentTensor) or (wanda and context.plan_only)
            changes[each.tensor] = (
                AbsentTensor(source.shape, source.dtype, each.tensor)
                if blind
                else _masked(source, pattern, each.axis, norms.get(each.tensor))
            )
            made = pattern.zeros(each.shape, each.axis, by_row=wanda)
            axis = each.axis if pattern.run else -1
            masks[each.tensor] = SparsityMask(self.pattern, axis, made / program.weights.elements(each.tensor))
            zeros += made
        return PassResult(
            program=replace(program, weights=program.weights.updated(changes), masks=masks),
            modified=True,
            requested=self.model_dump(),
            achieved={"tensors": len(changes), "zeros": zeros},
            diagnostics=diagnostics,
        )

    def _require_text(self, context: PassContext) -> None:
        if self.criterion == "wanda" and context.calibration is None and not context.plan_only:
            raise UsageError(
                "CS1121",
                "Ranking weights by wanda needs calibration text.",
                where="mask.criterion",
                why="It looks at how strongly each input is driven on that text.",
                hint="Give --calibration FILE, or choose magnitude.",
            )


def _masked(source: TensorSource, pattern: SparsityPattern, axis: int, norms: torch.Tensor | None) -> TensorSource:
    return DerivedTensor(source.shape, source.dtype, lambda: apply_pattern(source.load(), pattern, axis, norms))


def _unfit(program: Program, each: Contraction, pattern: SparsityPattern) -> Diagnostic | None:
    """Why no target could use the pattern in this tensor, or why it should not have it."""
    if any(is_lm_head(program, node) for node in each.nodes):
        return Diagnostic(each.tensor, "CS2204", "It is the lm_head, where every zero is felt directly.")
    if len(each.shape) > 2 and not pattern.run:
        return Diagnostic(each.tensor, "CS2204", "It is a convolution, where only N:M patterns are made.")
    why = pattern.misfit(each.shape, each.axis)
    return Diagnostic(each.tensor, "CS2204", why) if why else None


def _unrewarded(each: Contraction, pattern: SparsityPattern, target: Target) -> Diagnostic | None:
    """Why the target gains nothing from the pattern in a layer of this size; None when it does or says nothing about it."""
    rule = target.pattern(pattern.family)
    if rule is None:
        return None
    in_features, out_features = each.in_features, each.out_features
    wanted = []
    if in_features < rule.min_in_features or out_features < rule.min_out_features:
        least = [f"{rule.min_in_features} inputs"] * bool(rule.min_in_features) + [
            f"{rule.min_out_features} outputs"
        ] * bool(rule.min_out_features)
        wanted.append(f"it pays from {' and '.join(least)} on")
    if in_features % rule.in_features_multiple or out_features % rule.out_features_multiple:
        wanted.append(
            f"its kernels take inputs in multiples of {rule.in_features_multiple}, outputs of {rule.out_features_multiple}"
        )
    if not wanted:
        return None
    why = f"It has {in_features} inputs and {out_features} outputs; of {pattern.text} on {target.name}, {' and '.join(wanted)}."
    return Diagnostic(each.tensor, "CS2208", why, "It stays dense.")


def _nothing_left(pattern: SparsityPattern, diagnostics: Sequence[Diagnostic], target: Target) -> ModelError:
    first = next((each for each in diagnostics if each.code == "CS2208"), diagnostics[0] if diagnostics else None)
    others = f" {len(diagnostics) - 1} others are left out as well." if len(diagnostics) > 1 else ""
    return ModelError(
        "CS2203",
        f"No tensor is left to give the pattern {pattern.text} on {target.name}.",
        where="mask",
        why=f"{first.where}: {first.why}{others}" if first else "The model has no linear layer with a stored weight.",
        hint="Leave --sparsity out; --quantize and --prune need no pattern.",
    )


def _input_norms(program: Program, chosen: Sequence[Contraction], context: PassContext) -> Mapping[str, torch.Tensor]:
    """Norms of the input features by tensor; over all its layers when some share it."""
    if context.calibration is None:
        raise RuntimeError("the caller checks that there is calibration text")
    places = {each.tensor: [(node.name, each.input_dim) for node in each.inputs] for each in chosen}
    every = (place for group in places.values() for place in group)
    norms = feature_norms(program, every, context.calibration, context.progress)
    return {
        tensor: torch.stack([norms[place] for place in group]).square().sum(0).sqrt()
        for tensor, group in places.items()
    }
