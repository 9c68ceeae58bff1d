"""Contexts and comparisons for the tests of low rank."""

from __future__ import annotations

from dataclasses import replace

import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.linears import find_linears
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.compiler.targets.target import LowRankGemms
from compile_sparse.passes.factoring.candidates import find_candidates
from compile_sparse.passes.factoring.factors import factor
from compile_sparse.passes.factoring.rewriting import FactorSources
from compile_sparse.testing.models import example_inputs
from tests.support.contexts import context

EVERY = ("llama", "qwen2", "gpt2", "opt", "bert", "vit")


def low_rank_context(
    *, text: bool = False, alignment: int = 1, products: LowRankGemms | None = None, **options
) -> PassContext:
    return context(stream() if text else None, changes={"alignment": alignment, "low_rank": products}, **options)


def stream() -> CalibrationStream:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(3, 96, (16, 24), generator=generator)
    return CalibrationStream(tuple(tuple(w) for w in windows.tolist()), tokens_per_batch=192)


def outputs_of(program: Program, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    return Executor(program).run(example_inputs(program, batch, length))


def assert_same(found: Program, wanted: Program, tolerance: float) -> None:
    """Outputs at two sizes, relative to the largest element."""
    for batch, length in ((2, 7), (1, 12)):
        left, right = outputs_of(found, batch, length), outputs_of(wanted, batch, length)
        for name, value in right.items():
            if value.is_floating_point():
                assert (left[name] - value).abs().max() <= tolerance * value.abs().max(), name


def exact_sources(program: Program) -> dict[str, FactorSources]:
    """Full-rank factors of every candidate, though they hold more parameters."""
    sources = {}
    for each in find_candidates(program, low_rank_context())[0]:
        weight = program.weights.load(each.linear.tensor)
        found = factor(weight if each.linear.axis == 1 else weight.t()).to(torch.float32)
        sources[each.name] = FactorSources(ResidentTensor(found.inner), ResidentTensor(found.outer))
    return sources


def replaced(program: Program, factored: Program) -> Program:
    """The dense graph with each factored weight replaced by the product of its factors: the oracle."""
    changes = {}
    for linear in find_linears(program)[0]:
        stem = linear.tensor.removesuffix(".weight")
        inner, outer = (f"{stem}.{part}.weight" for part in ("inner", "outer"))
        if inner in factored.weights:
            left, right = factored.weights.load(outer).double(), factored.weights.load(inner).double()
            product = left @ right if linear.axis == 1 else right @ left
            changes[linear.tensor] = ResidentTensor(product.float())
    assert changes
    return replace(program, weights=program.weights.updated(changes))


def first_output(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(outputs.values()))


# -- what the runtime says


def gemms(**values) -> LowRankGemms:
    return LowRankGemms(**({"decode_pays_below": 1.0, "prefill_pays_below": 1.0, "measured": "x"} | values))
