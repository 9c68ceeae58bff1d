"""What becomes of the codes of a quantized checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import fx

from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.ir.dequantizing import add_dequantized
from compile_sparse.compiler.ir.gemms import Gemm, gemm_of
from compile_sparse.compiler.ir.graph_edits import Edits
from compile_sparse.compiler.ir.linears import is_lm_head
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES, Scheme
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.targets.target import Target

__all__ = ["KeepCodes", "scheme_name"]

ours = torch.ops.compile_sparse


def scheme_name(scheme: Scheme, target: Target) -> str:
    """What the target calls a scheme that it runs; empty for others. One scale for a whole weight is the same one for every
    channel.
    """
    channels = replace(scheme, weights=replace(scheme.weights, per_tensor=False))
    return next((name for name in target.schemes if SCHEMES[name] in (scheme, channels)), "")


class KeepCodes(Pass):
    """Give the linear layers of a program the codes that their weights have in the checkpoint, and their inputs the rounding that
    goes with them; nothing is rounded anew.

    A captured program computes with the values of the codes (``QuantizedTensor``), in floating point: passes that change shapes
    or values work on those. Codes return in front of the passes that quantize, if no earlier one changed a weight: removed blocks
    are no obstacle. What the target has no format for stays in floating point, with a diagnostic.

    Shapes: as the pass ``quantize``.
    """

    name: ClassVar[str] = "import"
    phase: ClassVar[Phase] = "quantization"
    changes_numerics: ClassVar[bool] = True

    method: str = Field(description="what wrote the checkpoint")
    captured: Any = Field(description="the program before any pass", exclude=True, repr=False)

    def run(self, program: Program, context: PassContext) -> PassResult:
        said = list(program.source.said)
        coded = {
            node: source
            for node in program.graph.nodes
            if isinstance(source := _stored(program, node), QuantizedTensor)
        }
        if why := self._changed(program):
            coded, said = {}, [*said, Diagnostic("import", "CS2222", why)]
        kept: dict[fx.Node, QuantizedTensor] = {}
        left: dict[str, list[str]] = {}
        names: Counter[str] = Counter()
        for node, source in coded.items():
            name = scheme_name(source.scheme, context.target)
            reason = _obstacle(program, node, source, context.target) or (
                "" if name else _foreign(source, context.target)
            )
            if reason:
                left.setdefault(reason, []).append(str(program.tensor_of(node)))
            else:
                kept[node], names[name] = source, names[name] + 1
        said += [_left(reason, tensors) for reason, tensors in left.items()]
        achieved = {"codes": dict(names), "in_float": sum(map(len, left.values()))}
        if not kept:
            return PassResult(program, modified=False, achieved=achieved, diagnostics=said)
        result = _with_codes(program.clone(), {node.name: source for node, source in kept.items()})
        note = f"The codes of {self.method} are kept: {', '.join(f'{count} weights are {n}' for n, count in names.items())}."
        return PassResult(result, modified=True, achieved=achieved, diagnostics=said, notes=[note])

    def _changed(self, program: Program) -> str:
        """Why codes of the checkpoint do not stand for the weights of ``program`` any more; empty where they do."""
        before: Program = self.captured
        own = [binding.tensor for binding in program.bindings.values() if binding.kind == "parameter"]
        changed = [name for name in own if before.weights.get(name) is not program.weights[name]]
        if not changed or not any(isinstance(source, QuantizedTensor) for source in before.weights.values()):
            return ""
        return (
            f"Earlier passes changed {len(changed)} weights ({changed[0]} first), so the model goes on in floating point, as the "
            f"values that the codes of {self.method} stand for; --quantize rounds those."
        )


def _stored(program: Program, node: fx.Node) -> object:
    name = program.tensor_of(node)
    return None if name is None else program.weights[name]


def _readers(node: fx.Node) -> list[Gemm] | None:
    """The linear layers that read a weight ``[N, K]``; None where something else does."""
    found = [gemm_of(user) for user in node.users]
    fits = all(gemm is not None and gemm.is_layer and gemm.weight is node and gemm.axis == 1 for gemm in found)
    return [gemm for gemm in found if gemm is not None] if fits else None


def _obstacle(program: Program, node: fx.Node, source: QuantizedTensor, target: Target) -> str:
    """Why a weight cannot keep its codes, whatever they are."""
    readers, weights = _readers(node), source.scheme.weights
    if readers is None:
        return "It is read by more than linear layers."
    if target.logits == "float" and any(is_lm_head(program, gemm.node) for gemm in readers):
        return "It gives the logits (the lm_head of a decoder); the target's runtime keeps that GEMM in floating point."
    if target.whole_groups and weights.group and source.shape[1] % weights.group:
        return f"Its inputs are no multiple of {weights.group}, and the target has no GEMMs with a shorter last group."
    return ""


def _foreign(source: QuantizedTensor, target: Target) -> str:
    return f"{target.name} does not run {_described(source.scheme)}; it runs {', '.join(target.schemes) or 'no codes'}."


def _described(scheme: Scheme) -> str:
    weights = scheme.weights
    text = f"{weights.bits}-bit {'integers' if weights.kind == 'int' else 'floats'}"
    if weights.group or weights.block:
        text += f" in groups of {weights.group}" if weights.group else f" in blocks of {weights.block}"
    text += "" if weights.symmetric else " with zero points"
    return f"{text} ({scheme.activations} inputs)" if scheme.activations else f"{text} (inputs in floating point)"


def _left(reason: str, tensors: list[str]) -> Diagnostic:
    where = tensors[0] if len(tensors) == 1 else f"{tensors[0]} and {len(tensors) - 1} more"
    return Diagnostic(
        where, "CS2223", f"{reason} The weight is stored in floating point, as the values that its codes stand for."
    )


def _first_user(node: fx.Node) -> fx.Node:
    return next(each for each in node.graph.nodes if each in node.users)


def _with_codes(program: Program, coded: Mapping[str, QuantizedTensor]) -> Program:
    """Args: ``program``, which may be edited; by placeholder, the weights that get their codes."""
    edits = Edits(program)
    rounded: dict[tuple[fx.Node, str, float | None], fx.Node] = {}
    for node in list(program.graph.nodes):
        source = coded.get(node.name)
        if source is None:
            continue
        gemms, tensor, form = _readers(node) or [], str(program.tensor_of(node)), source.scheme.activations
        weight = add_dequantized(edits, _first_user(node), node, tensor, source.scheme.weights, 1, source.parts)
        scale = source.parts.get("input_scale")
        # Layers that read one value share the node that rounds it, if they round it alike.
        number = None if scale is None else float(scale.load())
        for gemm in gemms:
            gemm.node.replace_input_with(node, weight)
            if not form:
                continue
            key = (gemm.input, form, number)
            if key not in rounded:
                fixed = (
                    ()
                    if scale is None
                    else (edits.placeholder(f"{node.name}_input_scale", f"{tensor}.input_scale", scale),)
                )
                rounded[key] = edits.before(
                    _first_user(gemm.input), ours.fake_quantize.default, gemm.input, form, *fixed
                )
            gemm.node.replace_input_with(gemm.input, rounded[key])
    return edits.applied({})
