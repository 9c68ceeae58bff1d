"""A transformers class and a program on the same inputs: what they are given, how far apart they are, what rounding explains."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch

from compile_sparse.compiler.execution.executor import decoder_inputs
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.gemms import multiplies
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.verify.reference import sample_inputs

__all__ = ["class_arguments", "largest_difference", "program_inputs", "rounding_bound", "without_cache"]

BATCH, TOKENS = 2, 24
_ATTENTION = "scaled_dot_product_attention"


def program_inputs(program: Program) -> dict[str, torch.Tensor]:
    """A few random inputs of the program; a decoder's cache is empty."""
    if program.kind == "decoder":
        length = min(TOKENS, context_length(program.config) or TOKENS)
        draw = torch.Generator().manual_seed(0)
        vocabulary = int(program.config["vocab_size"])
        return decoder_inputs(program, torch.randint(0, vocabulary, (BATCH, length), generator=draw))
    arrays = sample_inputs(program, 0, batch=BATCH, length=TOKENS)
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def class_arguments(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The same for the forward of the class."""
    if program.kind != "decoder":
        return dict(inputs)
    own = {entry.name for entry in program.inputs if entry.role in ("input_ids", "attention_mask")}
    return {**{name: inputs[name] for name in own}, "use_cache": False}


def without_cache(program: Program, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs that the class gives too."""
    caches = {output.name for output in program.outputs if output.role.startswith("present")}
    return {name: value.float() for name, value in outputs.items() if name not in caches}


def largest_difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> float:
    """Largest absolute difference of any output, relative to that output's largest value; infinite where one is missing, has
    another shape or is not a number.
    """
    worst = 0.0
    for name, value in expected.items():
        if name not in found or found[name].shape != value.shape:
            return float("inf")
        error = float((found[name].float() - value).abs().max() / value.abs().max().clamp_min(1e-30))
        worst = max(worst, error) if error == error else float("inf")
    return worst


def rounding_bound(program: Program) -> float:
    """Rounding in ``n`` GEMMs of up to ``K`` terms each, in another order of summation: about ``eps sqrt(K n)``.

    Rounding errors behave like a random walk (Higham and Mary, "A new approach to probabilistic rounding error analysis",
    2019); a factor 4 covers the tail.
    """
    gemms = sum(multiplies(node) or op_name(node) == _ATTENTION for node in program.graph.nodes)
    longest = max((max(source.shape) for source in program.weights.values() if len(source.shape) > 1), default=1)
    return 4 * torch.finfo(torch.float32).eps * sqrt(longest * max(1, gemms))
