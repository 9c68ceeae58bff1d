"""Percentile calibration against numpy, whatever the distribution, and what the quantize pass makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.targets.target import Target
from compile_sparse.passes.quantize import Quantize
from compile_sparse.passes.statistics.ranges import largest_magnitudes, magnitude_percentiles
from tests.support.contexts import context as any_context
from tests.toys import toy_program
from tests.unit.passes.running import Fed, Linear

DEPTH = 64
BIN = 2.0**-8
"""Relative width of a bin, at most: eight bits of fraction."""
STATIC = [name for name, scheme in SCHEMES.items() if scheme.static]


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outliers() -> list[torch.Tensor]:
    """Normal values, one of 9600 ten thousand times as large."""
    batches = [torch.randn(50, DEPTH, generator=draws(seed)) for seed in range(3)]
    batches[1][7, 3] = -1e4
    return batches


DISTRIBUTIONS = {
    "normal": [torch.randn(50, DEPTH, generator=draws(seed)) for seed in range(3)],
    "outliers": outliers(),
    "heavy": [torch.randn(50, DEPTH, generator=draws(seed)).pow(5) for seed in range(3)],
    "tiny": [torch.randn(50, DEPTH, generator=draws(seed)) * 1e-30 for seed in range(3)],
    "mostly zero": [(torch.randn(50, DEPTH, generator=draws(seed)) - 1).relu() for seed in range(3)],
    "one value": [torch.full((4, DEPTH), -0.75)],
}


def program() -> Program:
    weight = torch.randn(8, DEPTH, generator=draws(9))
    return toy_program(Linear(weight), [torch.zeros(3, DEPTH)], [{0: torch.export.Dim("rows")}])


def context(batches: list[torch.Tensor] | None, goal: Target | None = None, plan_only: bool = False) -> PassContext:
    text = None if batches is None else Fed((), inputs=tuple(batches))
    return any_context(text, goal=goal, schemes=tuple(SCHEMES), plan_only=plan_only)


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_percentile_is_that_of_numpy_to_the_width_of_a_bin(name: str, percent: float) -> None:
    batches, whole = DISTRIBUTIONS[name], program()
    source = next(node for node in whole.graph.nodes if node.name == whole.inputs[0].placeholder)
    found = magnitude_percentiles(whole, [source], context(batches), percent)[source.name]
    values = torch.cat(batches).abs().double().numpy().flatten()
    # The smallest of the values that at least this share does not exceed.
    exact = float(np.quantile(values, percent / 100, method="inverted_cdf"))
    if exact == 0:
        assert found == values.max(), "a range of zero represents nothing"
    else:
        assert exact <= found <= exact * (1 + BIN)
    assert found <= values.max()
    if percent == 100:
        assert found == largest_magnitudes(whole, [source], context(batches))[source.name] == values.max()


def test_one_outlier_moves_the_largest_magnitude_alone() -> None:
    whole = program()
    source = [node for node in whole.graph.nodes if node.name == whole.inputs[0].placeholder]
    assert largest_magnitudes(whole, source, context(outliers()))[source[0].name] == 1e4
    assert magnitude_percentiles(whole, source, context(outliers()), 99.9)[source[0].name] < 5


def test_nothing_but_zeros_has_no_range() -> None:
    whole = program()
    source = [node for node in whole.graph.nodes if node.name == whole.inputs[0].placeholder]
    assert magnitude_percentiles(whole, source, context([torch.zeros(3, DEPTH)]), 99.9) == {source[0].name: 0.0}


@pytest.mark.parametrize("scheme", STATIC)
def test_a_scale_reaches_to_the_percentile(scheme: str) -> None:
    made = Quantize(scheme=scheme, calibrator="percentile", percentile=99.9)  # type: ignore[arg-type]
    result = made.run(program(), context(outliers()))
    assert result.requested["calibrator"] == "percentile"
    assert result.requested["percentile"] == 99.9
    scale = float(result.program.weights.load("weight.input_scale"))
    top = {"w8a8-static": 127.0, "nvfp4": 448.0 * 6}.get(scheme, 448.0)
    reach = top / scale if scheme == "nvfp4" else scale * top
    values = torch.cat(outliers()).abs().double().numpy().flatten()
    exact = float(np.quantile(values, 0.999, method="inverted_cdf"))
    assert exact * (1 - 2.0**-22) <= reach <= exact * (1 + BIN + 2.0**-22)
    x = torch.randn(20, DEPTH, generator=draws(0))
    best, worst = (
        Executor(Quantize(scheme=scheme, **options).run(program(), context(outliers())).program).run({"x0": x})["y0"]  # type: ignore[arg-type]
        for options in ({"calibrator": "percentile", "percentile": 99.9}, {})
    )
    dense = Executor(program()).run({"x0": x})["y0"]
    # A range a thousand times too wide leaves int8 nothing of ordinary values; e4m3, and the scales of nvfp4, keep their
    # relative precision.
    if scheme == "w8a8-static":
        assert (best - dense).square().mean() < (worst - dense).square().mean() / 4


@pytest.mark.parametrize("options", [{"calibrator": "percentile"}, {"outputs": "all"}])
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in STATIC])
def test_options_without_an_effect_are_refused(scheme: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(scheme=scheme, **options).run(program(), context(None, plan_only=True))  # type: ignore[arg-type]
    assert caught.value.code == "CS1122"
    assert next(iter(options)) in caught.value.where


def test_a_percentile_without_its_calibrator_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(scheme="w8a8-static", percentile=99.0).run(program(), context(outliers()))
    assert (caught.value.code, caught.value.where) == ("CS1122", "quantize.percentile")


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan")])
def test_a_percentile_is_a_share(percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        Quantize(scheme="w8a8-static", calibrator="percentile", percentile=percent)
