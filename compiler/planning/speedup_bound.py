"""What a plan could gain at most: bytes and operations per token before and after it. An estimate, never a measurement."""

from __future__ import annotations

from typing import Any

from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.planning.token_cost import TokenCost, token_cost
from compile_sparse.compiler.targets.target import Target

__all__ = ["speedup_bound"]

BASIS = (
    "A bound from shapes, not a measurement: weights only (no attention over past tokens, no cache), one request; of embeddings "
    "only the rows looked up, of experts only those chosen."
)


def speedup_bound(dense: Program, planned: Program, target: Target, *, prompt: int) -> dict[str, Any]:
    """Ratios that no runtime can exceed as long as reading weights, or multiplying with them, is what takes the time.

    Args:
        dense, planned: before and after the passes.
        target: says which zeros are skipped.
        prompt: tokens of a sample, for models that are no decoders.

    Returns:
        Plain data: ``basis``; for a decoder ``decode`` (bytes read per decoded token) and ``prefill`` (operations per prompt
        token, without those of the lm_head, which a prompt needs once); for other models ``forward`` (operations per sample).
        Each has ``quantity``, ``baseline``, ``compiled``, ``at_most`` (the ratio, or None where it is not known), ``if`` (the
        condition of the bound) and ``unknown_because``.
    """
    decoder = dense.kind == "decoder"
    before, after = (token_cost(each, tokens=1 if decoder else prompt) for each in (dense, planned))
    zeros = _skipped_zeros(planned, target)
    gemms = _gemms(before, after, zeros or _integers(planned))
    if not decoder:
        return {"basis": BASIS, "forward": {"quantity": "operations per sample", **gemms}}
    read, left = (sum(cost.read_bytes.values()) for cost in (before, after))
    return {
        "basis": BASIS,
        "decode": {
            "quantity": "bytes read per decoded token",
            **_bound(read, left, "bandwidth-bound on weights", zeros),
        },
        "prefill": {"quantity": "operations per prompt token", **gemms},
    }


def _gemms(before: TokenCost, after: TokenCost, why: str) -> dict[str, Any]:
    uncounted = ", ".join({*before.uncounted, *after.uncounted})
    work, left = (sum(cost.flops.values()) - cost.head_flops for cost in (before, after))
    return _bound(
        work, left, "compute-bound on weights", f"the work of {uncounted} is not counted" if uncounted else why
    )


def _bound(before: int, after: int, condition: str, why: str) -> dict[str, Any]:
    known = not why and after > 0
    return {
        "baseline": before,
        "compiled": after,
        "at_most": before / after if known else None,
        "if": condition,
        "unknown_because": "" if known else why or "nothing is left to count",
    }


def _integers(program: Program) -> str:
    quantized = any(op_name(node).startswith("dequantize_") for node in program.graph.nodes)
    return "quantized GEMMs run at another rate than the baseline's" if quantized else ""


def _skipped_zeros(program: Program, target: Target) -> str:
    for mask in program.masks.values():
        entry = target.pattern(mask.pattern)
        if entry is not None and entry.pays:
            return f"the target skips zeros of pattern {mask.pattern}, which are counted here as weights"
    return ""
