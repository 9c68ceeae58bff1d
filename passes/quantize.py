"""Quantize the weights of linear layers (and their inputs, where the scheme says so), as explicit nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import ModelError, Refusal, UsageError
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.extension.quantizers import find_quantizer
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.graph_edits import Edits
from compile_sparse.compiler.ir.linears import Linear, find_linears, is_lm_head
from compile_sparse.compiler.ir.ops.quantization import WEIGHT_DEQUANTIZERS
from compile_sparse.compiler.ir.program import Program, SparsityMask
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES, Scheme, SchemeName
from compile_sparse.compiler.ir.sparsity_pattern import SparsityPattern
from compile_sparse.compiler.ir.storage import torch_dtype
from compile_sparse.compiler.ir.weights import TensorSource
from compile_sparse.compiler.targets.target import Target
from compile_sparse.passes.quantization.activations import OUTPUT_FORMAT, ActivationQuantizer
from compile_sparse.passes.quantization.calibrated import calibrated_weights, input_powers
from compile_sparse.passes.quantization.choice import Choices, choose_schemes
from compile_sparse.passes.quantization.group_hint import group_hint
from compile_sparse.passes.quantization.rewriting import Rewriter
from compile_sparse.passes.quantization.weights import Quantized, Weight, weights_of
from compile_sparse.passes.statistics.ranges import largest_magnitudes, magnitude_percentiles

__all__ = ["Quantize"]


def _known(name: str) -> str:
    try:
        find_quantizer(name)
    except UsageError as error:
        raise ValueError(f"{error.what} {error.why} {error.hint}") from error
    return name


class Quantize(Pass):
    """Replace ``linear(x, W)`` by ``linear(x', dequantize(q, s))``, with ``x'`` the quantize-dequantized (QDQ) input where the
    scheme quantizes activations.

    How codes ``q`` are chosen is up to a quantizer (``compiler/extension/quantizer_contract.py``), by default ``round(W / s)``.
    They are symmetric, or have a zero point inside the range, so stored zeros stay zero. Scales run along the contraction
    dimension: per output channel, per group, or per block (all schemes are in ``compiler/ir/quantization_schemes.py``).
    Activations: one scale per token, found at run time; ``-static`` schemes, ``fp8-tensor`` and ``nvfp4`` fix their range on
    calibration text, at the largest magnitude or at a percentile of the magnitudes. The output of an int8 GEMM is
    quantize-dequantized as well where the weight is masked and the target's sparse kernel for the mask must give int8 to be the
    faster one. The mask of a weight moves to its codes. Which layers: every linear; the lm_head is kept at 8 bits where the
    scheme says 4, or left in floating point where the target's runtime does not quantize it: it is read once per token like
    every other layer but decides every token. On targets that have ``fallbacks`` for the scheme, layers whose outputs it would
    put too far off get one of those or stay in floating point (``passes/quantization/choice.py``).

    Leaves alone: embeddings, convolutions, and any linear whose weight is not a stored two-dimensional parameter.

    Shapes: ``W [N, K]`` (linear) or ``[K, N]`` (addmm); ``q`` of the same shape; ``s`` float32 ``[N]`` or
    ``[N, ceil(K / group)]``; ranges of activations float32 ``[1]``.

    Raises:
        Refusal: CS4102, the target has no kernel for the scheme, or none that gives int8.
        ModelError: CS2201, there is nothing to quantize; CS2213, the weights are codes already.
        UsageError: CS1121, ranges or statistics are to be measured and there is no calibration text; CS1122, an option does
            not apply to the scheme.
        EnvironmentFailure: CS5013, the quantizer does not keep its contract.
    """

    name: ClassVar[str] = "quantize"
    phase: ClassVar[Phase] = "quantization"
    changes_numerics: ClassVar[bool] = True

    scheme: SchemeName = Field(
        description="w8a8: int8 weights and run-time int8 activations, -static: activation ranges from calibration; "
        "w8a16, w4a16: weights only, groups of 128, -g32: of 32, -channel: one scale per channel, -asym: with zero points; "
        "fp8, fp8-static, fp8-tensor, fp8-block: e4m3, -tensor: static, one scale per weight; nvfp4: e2m1 in groups of 16"
    )
    reduce_range: bool = Field(
        default=False,
        description="w8a8 schemes: weight codes of 7 bits (stored in 8), so that pairs of products fit in 16 bits; exact on "
        "processors without 8-bit dot products (VNNI), whose kernels saturate otherwise",
    )
    quantizer: Annotated[str, AfterValidator(_known)] = Field(
        default="rtn",
        description="how codes are chosen; rtn: round to nearest, for models of text on scales searched for the least error of "
        "outputs; others by installed packages",
    )
    calibrator: Literal["min-max", "percentile"] = Field(
        default="min-max",
        description="how ranges fixed ahead are found; min-max: the largest magnitude on calibration text; percentile: the "
        "magnitude that most values do not exceed, larger ones saturate",
    )
    percentile: float = Field(
        default=99.99,
        gt=0,
        le=100,
        description="calibrator percentile: share of values within the range, percent, above 0 to 100",
    )
    outputs: Literal["auto", "none", "all"] = Field(
        default="auto",
        description="w8a8-static: which linear layers give int8; auto: masked ones where the target's sparse kernels need it; "
        "all: every one but the lm_head",
    )

    fallback: Literal["auto", "none"] = Field(
        default="auto",
        description="auto: layers whose outputs w8a8 or w8a8-static would put too far off get the target's next format or stay "
        "in floating point; none: all have the scheme",
    )

    @property
    def contraction_multiple(self) -> int:
        """Groups and blocks divide multiples of their size."""
        weights = SCHEMES[self.scheme].weights
        return weights.group or weights.block or 1

    def run(self, program: Program, context: PassContext) -> PassResult:
        self._require(context)
        _require_unquantized(program)
        scheme = SCHEMES[self.scheme]
        if self.reduce_range:
            scheme = replace(scheme, weights=replace(scheme.weights, reduced_range=True))
        edited = program.clone()
        linears, diagnostics = find_linears(edited)
        if context.target.logits == "float":
            linears, heads = _without_logits(edited, linears)
            diagnostics = [*diagnostics, *heads]
        if context.target.whole_groups and scheme.weights.group:
            linears, broken = _with_whole_groups(edited, linears, scheme.weights.group)
            diagnostics = [*diagnostics, *broken]
        if not linears:
            raise _nothing(diagnostics)
        outputs = self._quantized_outputs(edited, linears, context.target)
        ranges = self._ranges(edited, linears, outputs, context) if scheme.static and not context.plan_only else None
        choices = self._choices(edited, linears, scheme, context, ranges, outputs)
        diagnostics = [*diagnostics, *choices.diagnostics]
        schemes = {
            linear: name
            for linear in linears
            if (name := choices.schemes.get((linear.tensor, linear.axis), self.scheme)) is not None
        }
        linears = list(schemes)
        if not linears:
            raise _nothing(diagnostics)
        outputs = [
            linear
            for linear in outputs
            if schemes.get(linear) == self.scheme and linear.node.name not in choices.float_outputs
        ]
        edits, activations, weights = Edits(edited), None, dict[tuple[str, int], Weight]()
        if scheme.activations:
            stored = _scale_type(scheme, context)
            activations = ActivationQuantizer(edits, scheme.activations, ranges=ranges, stored=stored)
        own = {name: scheme if name == self.scheme else SCHEMES[name] for name in schemes.values()}
        for name, each in own.items():
            group = [linear for linear in linears if schemes[linear] == name]
            made_of = weights_of(edited, group, each.weights, _scale_type(each, context))
            if name == self.scheme and not context.plan_only:
                diagnostics = [*diagnostics, *group_hint(made_of, name, context.target.schemes)]
            weights |= made_of
        made = self._quantized(program, linears, weights, context)
        work = Rewriter(edits, activations)
        for linear in linears:
            key, rounds_input = (linear.tensor, linear.axis), bool(own[schemes[linear]].activations)
            work.quantize(linear, weights[key], made[key], rounds_input=rounds_input)
        before = sum(program.weights.elements(linear.tensor) for linear in linears)
        result = work.finish(outputs)
        return PassResult(
            program=result,
            modified=True,
            requested={"scheme": self.scheme, "quantizer": self.quantizer} | self.model_dump(exclude_defaults=True),
            achieved={
                "linears": len(linears),
                "elements": before,
                "bits_per_weight": round(work.code_bits / before, 3),
            }
            | ({"int8_outputs": len(outputs)} if scheme.activations == OUTPUT_FORMAT else {}),
            diagnostics=diagnostics,
            notes=choices.notes,
        )

    def _choices(
        self,
        program: Program,
        linears: Sequence[Linear],
        scheme: Scheme,
        context: PassContext,
        ranges: Mapping[str, float] | None,
        outputs: Sequence[Linear],
    ) -> Choices:
        """What layers have that the scheme would put too far off."""
        fallbacks = context.target.fallbacks.get(self.scheme)
        if fallbacks is None or self.fallback == "none":
            return Choices()
        if context.plan_only:
            instead = " or ".join([*fallbacks, "floating point"])
            note = f"Layers whose outputs {self.scheme} would put too far off, which is measured when compiling, get {instead}."
            return Choices(notes=(note,))
        return choose_schemes(program, linears, (self.scheme, scheme), context, ranges, outputs)

    def _quantized(
        self,
        program: Program,
        linears: Sequence[Linear],
        weights: Mapping[tuple[str, int], Weight],
        context: PassContext,
    ) -> Mapping[tuple[str, int], Mapping[str, TensorSource]]:
        """The tensors that each weight is stored as: by shape while planning, computed now where that needs statistics, else when
        they are written.
        """
        quantizer, memory = find_quantizer(self.quantizer), Quantized()
        if not quantizer.needs_statistics:
            powers = dict[tuple[str, int], torch.Tensor]()
            text = context.calibration or context.sample
            if quantizer.weighs_inputs and text is not None and not context.plan_only:
                powers = input_powers(program, linears, text, context.progress)
            return {key: weight.on_demand(quantizer, memory, powers.get(key)) for key, weight in weights.items()}
        if context.plan_only or context.calibration is None:
            return {key: weight.absent() for key, weight in weights.items()}
        return calibrated_weights(program, linears, weights, quantizer, context.calibration, context.progress)

    def _quantized_outputs(self, program: Program, linears: Sequence[Linear], target: Target) -> list[Linear]:
        """Layers whose outputs are quantized too."""
        if SCHEMES[self.scheme].activations != OUTPUT_FORMAT or self.outputs == "none":
            return []
        if self.outputs == "all":
            return [linear for linear in linears if not is_lm_head(program, linear.node)]
        return [linear for linear in linears if _needs_int8_output(program.masks.get(linear.tensor), target)]

    def _ranges(
        self, program: Program, linears: Sequence[Linear], outputs: Sequence[Linear], context: PassContext
    ) -> Mapping[str, float]:
        nodes = dict.fromkeys([*(linear.input for linear in linears), *(linear.node for linear in outputs)])
        if self.calibrator == "percentile":
            return magnitude_percentiles(program, nodes, context, self.percentile)
        return largest_magnitudes(program, nodes, context)

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
        self._require_meaning(SCHEMES[self.scheme])
        if self.outputs == "all" and not any(entry.int8_outputs for entry in target.sparse_patterns):
            raise Refusal(
                "CS4102",
                f"{target.name} has no GEMMs that give int8.",
                where="quantize.outputs",
                why="Its contract names none, and outputs that are quantized and dequantized again would only cost accuracy.",
                hint="Leave the option out, or choose a TensorRT target.",
            )
        if context.calibration is not None or context.plan_only:
            return
        if SCHEMES[self.scheme].static:
            raise UsageError(
                "CS1121",
                f"{self.scheme} needs calibration text.",
                where="--quantize",
                why="The range of activations is fixed ahead, from what it is on that text.",
                hint="Give --calibration FILE, or choose w8a8 or fp8, whose ranges are found at run time.",
            )
        if find_quantizer(self.quantizer).needs_statistics:
            raise UsageError(
                "CS1121",
                f"Quantizer {self.quantizer!r} needs calibration text.",
                where="--quantizer",
                why="It chooses codes by what the inputs of each layer are on that text.",
                hint="Give --calibration FILE, or choose rtn.",
            )

    def _require_meaning(self, scheme: Scheme) -> None:
        """Refuse options that would have no effect."""
        if self.reduce_range and not scheme.activations.startswith("int8"):
            why = "It keeps GEMMs of 8-bit weights and 8-bit activations from overflowing; this scheme has none."
            raise self._meaningless("reduce_range", why, "Leave it out, or choose w8a8.")
        if self.calibrator == "percentile" and not scheme.static:
            why = "It is a way to fix ranges of activations ahead; this scheme fixes none."
            raise self._meaningless("calibrator", why, "Leave it out, or choose w8a8-static.")
        if "percentile" in self.model_fields_set and self.calibrator != "percentile":
            why = f"The calibrator is {self.calibrator}, which takes the largest magnitude."
            raise self._meaningless("percentile", why, "Set calibrator: percentile as well, or leave it out.")
        if self.outputs == "all" and scheme.activations != OUTPUT_FORMAT:
            why = "Outputs are quantized to int8 with a range fixed ahead, as the inputs of w8a8-static are."
            raise self._meaningless("outputs", why, "Leave it out, or choose w8a8-static.")

    def _meaningless(self, option: str, why: str, hint: str) -> UsageError:
        what = f"{option} does not apply to {self.scheme}."
        return UsageError("CS1122", what, where=f"quantize.{option}", why=why, hint=hint)


def _require_unquantized(program: Program) -> None:
    coded = [node for node in program.graph.nodes if op_name(node) in WEIGHT_DEQUANTIZERS]
    if coded:
        raise ModelError(
            "CS2213",
            "The model is quantized already.",
            where=coded[0].name,
            why=f"{len(coded)} of its weights are codes, which would be rounded a second time.",
            hint="Leave --quantize out: the codes are kept. For others start from the model it was made of, or compile it for hf "
            "first, which writes it in floating point.",
        )


def _nothing(diagnostics: Sequence[Diagnostic]) -> ModelError:
    why = diagnostics[0].why if diagnostics else "The model has no linear layer with a stored weight."
    return ModelError("CS2201", "There is nothing to quantize.", where="quantize", why=why)


def _needs_int8_output(mask: SparsityMask | None, target: Target) -> bool:
    entry = target.pattern(SparsityPattern.parse(mask.pattern).family) if mask is not None else None
    return entry is not None and entry.int8_outputs


def _with_whole_groups(
    program: Program, linears: Sequence[Linear], group: int
) -> tuple[list[Linear], list[Diagnostic]]:
    """Layers whose contraction dimension the groups divide; the others stay in floating point."""
    kept, diagnostics = [], []
    for linear in linears:
        depth = program.weights[linear.tensor].shape[linear.axis]
        if depth % group == 0:
            kept.append(linear)
            continue
        why = f"Its {depth} inputs are no multiple of {group}, and the target has no GEMMs with a shorter last group."
        diagnostics.append(
            Diagnostic(linear.tensor, "CS2209", why, "It stays in floating point; smaller groups may divide it.")
        )
    return kept, diagnostics


def _scale_type(scheme: Scheme, context: PassContext) -> torch.dtype:
    """Type that scales are stored in. Codes are chosen for the scales as they are stored."""
    if scheme.activations == "" or context.target.scales == "precision":
        return torch_dtype(context.settings.precision_on(context.target))
    return torch.float32


def _without_logits(program: Program, linears: Sequence[Linear]) -> tuple[list[Linear], list[Diagnostic]]:
    heads = [linear for linear in linears if is_lm_head(program, linear.node)]
    why = "It gives the logits (the lm_head of a decoder); the target's runtime keeps that GEMM in floating point."
    diagnostics = [Diagnostic(linear.tensor, "CS2205", why) for linear in heads]
    return [linear for linear in linears if linear not in heads], diagnostics
