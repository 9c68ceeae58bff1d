"""Quantize the weights of linear layers (and their inputs, where the scheme says so), as explicit nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from compile_sparse.compiler.contract import PassContext, PassResult
from compile_sparse.compiler.errors import ModelError, Refusal, UsageError
from compile_sparse.compiler.linears import Linear, find_linears, makes_logits
from compile_sparse.compiler.program import Program
from compile_sparse.compiler.schemes import SCHEMES, SchemeName
from compile_sparse.compiler.skip import Skip
from compile_sparse.compiler.stored_size import torch_dtype
from compile_sparse.passes.quantization.rewriting import Rewriter
from compile_sparse.passes.statistics.ranges import largest_magnitudes

__all__ = ["Quantize"]


class Quantize(BaseModel):
    """Replace ``linear(x, W)`` by ``linear(x', dequantize(q, s))``, with ``x'`` the coded and restored input where the scheme
    quantizes activations.

    ``q = round(W / s)`` (arXiv:2004.09602): symmetric, or with a zero point inside the range, so stored zeros stay zero. Scales
    run along the contraction dimension: per output channel, per group, or per block (``compiler/schemes.py`` lists all schemes).
    Activations: one scale per token or, on targets that say so, per tensor, found at run time; ``-static`` schemes and ``nvfp4``
    fix their range on calibration text. Which layers: every linear; the projection that makes the logits is kept at 8 bits
    where the scheme says 4, or left in floating point where the target's runtime does not quantize it: it is read once per
    token like every other layer but decides every token.

    Leaves alone: embeddings, convolutions, and any linear whose weight is not a stored two-dimensional parameter.

    Shapes: ``W [N, K]`` (linear) or ``[K, N]`` (addmm); ``q`` of the same shape; ``s`` float32 ``[N]`` or
    ``[N, ceil(K / group)]``.

    Raises:
        Refusal: CS4102, the target has no kernel for the scheme.
        ModelError: CS2201, there is nothing to quantize.
        UsageError: CS1121, ranges are to be measured and there is no calibration text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str] = "quantize"
    stage: ClassVar[str] = "quantization"

    scheme: SchemeName = Field(
        description="w8a8: int8 weights and run-time int8 activations, -static: activation ranges from calibration; "
        "w8a16, w4a16: weights only, groups of 128, -g32: of 32, -channel: one scale per channel, -asym: with zero points; "
        "fp8, fp8-static, fp8-block: e4m3; nvfp4: e2m1 in groups of 16"
    )
    reduce_range: bool = Field(
        default=False,
        description="w8a8 schemes: weight codes of 7 bits (stored in 8), so that pairs of products fit in 16 bits; exact on "
        "processors without 8-bit dot products (VNNI), whose kernels saturate otherwise",
    )
    quantizer: Literal["rtn"] = Field(default="rtn", description="how codes are chosen; rtn: round to nearest")

    @property
    def contraction_multiple(self) -> int:
        """Contraction sizes that whole groups divide; earlier passes keep to it."""
        weights = SCHEMES[self.scheme].weights
        return weights.group or weights.block or 1

    def run(self, program: Program, context: PassContext) -> PassResult:
        self._require(context)
        scheme = SCHEMES[self.scheme]
        if self.reduce_range:
            scheme = replace(scheme, weights=replace(scheme.weights, bits=7))
        edited = program.clone()
        linears, skips = find_linears(edited)
        if context.target.logits == "float":
            linears, heads = _without_logits(edited, linears)
            skips = [*skips, *heads]
        if not linears:
            raise ModelError(
                "CS2201",
                "There is nothing to quantize.",
                where="quantize",
                why=skips[0].why if skips else "The model has no linear layer with a stored weight.",
            )
        ranges: Mapping[str, float] | None = None
        if scheme.static and not context.plan_only:
            ranges = largest_magnitudes(edited, dict.fromkeys(linear.input for linear in linears), context)
        work = Rewriter(
            edited,
            scheme,
            linears,
            ranges=ranges,
            per_tensor=context.target.activation_scales == "tensor",
            stored=torch_dtype(context.target.baseline_precision) if scheme.activations == "" else torch.float32,
        )
        with context.progress.task("quantize", total=len(linears)) as task:
            for linear in linears:
                work.quantize(linear)
                task.advance()
        before = sum(program.weights.elements(linear.tensor) for linear in linears)
        result = work.finish()
        return PassResult(
            program=result,
            modified=True,
            requested={"scheme": self.scheme, "quantizer": self.quantizer}
            | ({"reduce_range": True} if self.reduce_range else {}),
            achieved={
                "linears": len(linears),
                "elements": before,
                "bits_per_weight": round(work.code_bits / before, 3),
            },
            skips=skips,
        )

    def _require(self, context: PassContext) -> None:
        target = context.target
        if self.scheme not in target.schemes:
            own = target.refused_schemes.get(self.scheme)
            raise Refusal(
                "CS4102",
                f"{target.name} cannot run {self.scheme}.",
                where="--quantize",
                why=(f"{own} " if own else "") + f"It executes {', '.join(target.schemes) or 'no quantized weights'}.",
                hint="Choose one of those schemes, or another target.",
            )
        if self.reduce_range and not SCHEMES[self.scheme].activations.startswith("int8"):
            raise UsageError(
                "CS1122",
                f"reduce_range does not apply to {self.scheme}.",
                where="quantize.reduce_range",
                why="It keeps products of 8-bit weights and 8-bit activations from overflowing; this scheme has none.",
                hint="Leave it out, or choose w8a8.",
            )
        if SCHEMES[self.scheme].static and context.calibration is None and not context.plan_only:
            raise UsageError(
                "CS1121",
                f"{self.scheme} needs calibration text.",
                where="--quantize",
                why="The range of activations is fixed ahead, from what it is on that text.",
                hint="Give --calibration FILE, or choose w8a8 or fp8, whose ranges are found at run time.",
            )


def _without_logits(program: Program, linears: Sequence[Linear]) -> tuple[list[Linear], list[Skip]]:
    heads = [linear for linear in linears if makes_logits(program, linear.node)]
    why = "It makes the logits; the target's runtime keeps that product in floating point."
    skips = [Skip(linear.tensor, "CS2205", why) for linear in heads]
    return [linear for linear in linears if linear not in heads], skips
